"""Builds identity for the shell."""

from dataclasses import dataclass
from datetime import timedelta

import httpx

from parley.core.db import Database
from parley.core.rate_limits import RateLimits
from parley.core.revocations import Revocations
from parley.core.secrets import key_ring
from parley.core.settings import Settings
from parley.identity.api_keys import ApiKeys
from parley.identity.authenticator import SessionAuthenticator
from parley.identity.bearer import BearerAuthenticator
from parley.identity.clerk_webhooks import ClerkWebhooks, load_webhook_secrets
from parley.identity.devices import Devices
from parley.identity.guessing import Guessing
from parley.identity.issuer_tokens import IssuerTokens
from parley.identity.issuers import Issuer
from parley.identity.one_time_tokens import OneTimeTokens, SecretHash
from parley.identity.password_service import PasswordService
from parley.identity.passwords import Passwords
from parley.identity.refresh import RefreshTokens
from parley.identity.service import IdentityService
from parley.identity.session_repository import SessionLimits
from parley.identity.sessions import SessionService
from parley.identity.tokens import AccessTokens

AUDIENCE = "parley-api"


@dataclass(frozen=True, slots=True)
class Identity:
    """What the shell keeps of identity, and closes."""

    tokens: AccessTokens
    passwords: Passwords
    authenticator: SessionAuthenticator
    api_keys: ApiKeys
    bearer: BearerAuthenticator
    service: IdentityService
    password_service: PasswordService
    one_time_tokens: OneTimeTokens
    invitation_hash: SecretHash
    clerk_webhooks: ClerkWebhooks
    external: IssuerTokens | None

    async def close(self) -> None:
        """Finish the look-ups under way and end the threads. Call before the database closes."""
        await self.authenticator.close()
        await self.api_keys.close()
        if self.external is not None:
            await self.external.close()
        self.passwords.close()


def own_issuer(settings: Settings) -> str:
    """Return what our own tokens have as `iss`."""
    # Not the address in development, where the port changes between two starts.
    return settings.public_url.rstrip("/") or "parley"


def build_identity(
    database: Database,
    settings: Settings,
    secrets: tuple[str, ...],
    *,
    revocations: Revocations | None = None,
    limits: RateLimits | None = None,
    issuers: tuple[Issuer, ...] = (),
    http: httpx.AsyncClient | None = None,
) -> Identity:
    """Build identity on a database. The keys derive from the secrets: the first one signs, all of them verify."""
    auth = settings.auth
    revocations = revocations or Revocations()
    limits = limits or RateLimits(enabled=False)
    tokens = AccessTokens(
        key_ring(secrets, "access-token"),
        issuer=own_issuer(settings),
        audience=AUDIENCE,
        life=timedelta(minutes=auth.access_token_minutes),
    )
    passwords = Passwords(auth)
    authenticator = SessionAuthenticator(database, tokens, cache_s=auth.session_cache_s, revocations=revocations)
    api_keys = ApiKeys(database, key_ring(secrets, "api-key"), cache_s=auth.session_cache_s, revocations=revocations)
    sessions = SessionService(
        database,
        tokens=tokens,
        refresh_tokens=RefreshTokens(key_ring(secrets, "refresh-token")),
        revocations=revocations,
        limits=SessionLimits(
            idle=timedelta(days=auth.refresh_idle_days),
            absolute=timedelta(days=auth.refresh_absolute_days),
            grace=timedelta(seconds=auth.refresh_grace_s),
        ),
        rates=limits,
        refresh_per_minute=settings.limits.refresh_per_minute,
    )
    external = None
    if issuers and http is not None:
        external = IssuerTokens(
            database,
            issuers,
            http,
            cache_s=auth.session_cache_s,
            revocations=revocations,
            workspaces_per_month=settings.limits.workspaces_per_month if limits.enabled else None,
        )
    guessing = Guessing(limits, settings.limits)
    one_time_tokens = OneTimeTokens(key_ring(secrets, "one-time-token"))
    service = IdentityService(
        database,
        passwords=passwords,
        sessions=sessions,
        devices=Devices(key_ring(secrets, "device")),
        guessing=guessing,
        limits=limits,
        settings=settings,
    )
    return Identity(
        tokens=tokens,
        passwords=passwords,
        authenticator=authenticator,
        api_keys=api_keys,
        # Sessions last: they take whatever no other kind took.
        bearer=BearerAuthenticator((api_keys, *([external] if external else []), authenticator)),
        service=service,
        password_service=PasswordService(
            database,
            passwords=passwords,
            sessions=sessions,
            tokens=one_time_tokens,
            guessing=guessing,
            limits=limits,
            settings=settings.limits,
        ),
        one_time_tokens=one_time_tokens,
        external=external,
        clerk_webhooks=ClerkWebhooks(
            database, issuers, secrets=load_webhook_secrets(settings), revocations=revocations
        ),
        invitation_hash=SecretHash(key_ring(secrets, "invitation")),
    )
