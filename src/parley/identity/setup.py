"""Builds identity for the shell."""

from dataclasses import dataclass
from datetime import timedelta

from parley.core.db import Database
from parley.core.secrets import key_ring
from parley.core.settings import Settings
from parley.identity.authenticator import SessionAuthenticator
from parley.identity.passwords import Passwords
from parley.identity.refresh import RefreshTokens
from parley.identity.repository import SessionLimits
from parley.identity.service import IdentityService
from parley.identity.tokens import AccessTokens

AUDIENCE = "parley-api"


@dataclass(frozen=True, slots=True)
class Identity:
    """What the shell keeps of identity, and closes."""

    tokens: AccessTokens
    passwords: Passwords
    authenticator: SessionAuthenticator
    service: IdentityService

    async def close(self) -> None:
        """Finish the look-ups under way and end the threads. Call before the database closes."""
        await self.authenticator.close()
        self.passwords.close()


def build_identity(database: Database, settings: Settings, secrets: tuple[str, ...]) -> Identity:
    """Build identity on a database. The keys derive from the secrets: the first one signs, all of them verify."""
    auth = settings.auth
    tokens = AccessTokens(
        key_ring(secrets, "access-token"),
        # Not the address in development, where the port changes between two starts.
        issuer=settings.public_url.rstrip("/") or "parley",
        audience=AUDIENCE,
        life=timedelta(minutes=auth.access_token_minutes),
    )
    passwords = Passwords(auth)
    authenticator = SessionAuthenticator(database, tokens, cache_s=auth.session_cache_s)
    service = IdentityService(
        database,
        tokens=tokens,
        refresh_tokens=RefreshTokens(key_ring(secrets, "refresh-token")),
        passwords=passwords,
        authenticator=authenticator,
        limits=SessionLimits(
            idle=timedelta(days=auth.refresh_idle_days),
            absolute=timedelta(days=auth.refresh_absolute_days),
            grace=timedelta(seconds=auth.refresh_grace_s),
        ),
    )
    return Identity(tokens=tokens, passwords=passwords, authenticator=authenticator, service=service)
