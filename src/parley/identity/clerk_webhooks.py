"""Clerk's webhooks: signed by Svix, delivered at least once and in any order.

Each counts once, an older one than what is known counts not at all, and who was deleted stays deleted.
"""

import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import orjson
from svix.webhooks import Webhook

from parley.core import clock
from parley.core.db import Database, UnitOfWork
from parley.core.errors import BadRequest, NotFound
from parley.core.revocations import Revocation, Revocations
from parley.core.settings import Settings, SettingsInvalid
from parley.identity.errors import UserUnknown
from parley.identity.external_users import Profile, UnscopedExternalUsers, erased_subject
from parley.identity.issuers import Algorithm, Issuer
from parley.tenancy.audit import Action, record

logger = logging.getLogger(__name__)

SOURCE = "clerk"
_KINDS = {"user.created", "user.updated", "user.deleted"}

_ONCE = "INSERT INTO webhook_events (source, event_id) VALUES ($1, $2) ON CONFLICT DO NOTHING RETURNING event_id"
_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))"
_FIND = "SELECT user_id, updated_at, deleted_at FROM identities WHERE issuer = $1 AND subject = $2"
_UPDATE_USER = "UPDATE users SET email = $2, name = $3, email_verified = $4 WHERE id = $1"
_SEEN = "UPDATE identities SET updated_at = $3 WHERE issuer = $1 AND subject = $2"
# Whom an erasure has left a hash of, a late message does not name again.
_TOMBSTONE = """
    INSERT INTO identities (issuer, subject, updated_at, deleted_at)
    SELECT $1::text, $2::text, $3::timestamptz, $3
    WHERE NOT EXISTS (SELECT FROM identities WHERE issuer = $1 AND subject = $4)
    ON CONFLICT (issuer, subject) DO UPDATE SET updated_at = greatest(identities.updated_at, $3), deleted_at = $3
"""
_DISABLE = "UPDATE users SET disabled_at = coalesce(disabled_at, $2), tokens_valid_after = $2 WHERE id = $1"


class SignatureInvalid(BadRequest):
    """Not signed by whom we know, too old, or unreadable: one answer for all."""

    code = "signature_invalid"
    message = "The signature is not valid."


class WebhooksOff(NotFound):
    """No secret is configured, or no issuer that the messages could be about."""

    message = "Not found."


def load_webhook_secrets(settings: Settings) -> tuple[str, ...]:
    """Return the secrets that messages are signed with. Raises `SettingsInvalid` for one that is none."""
    secret = settings.auth.clerk_webhook_secret
    found = tuple(part.strip() for part in secret.get_secret_value().split(",") if part.strip()) if secret else ()
    for one in found:
        try:
            Webhook(one)
        except (ValueError, RuntimeError):
            raise SettingsInvalid(
                "PARLEY_AUTH_CLERK_WEBHOOK_SECRET is no signing secret: it looks like whsec_ and base64"
            ) from None
    return found


class ClerkWebhooks:
    """Takes messages about users."""

    def __init__(
        self, database: Database, issuers: tuple[Issuer, ...], *, secrets: tuple[str, ...], revocations: Revocations
    ) -> None:
        self._database = database
        self._issuer = _clerk(issuers)
        self._secrets = secrets
        self._revocations = revocations
        self._users = UnscopedExternalUsers(database)

    async def take(self, body: bytes, headers: Mapping[str, str]) -> None:
        """Verify a message and do what it says, in one transaction with the note that it was taken.

        Raises `SignatureInvalid`, `WebhooksOff`, and `Unavailable` so that the sender tries again.
        """
        if not self._secrets or self._issuer is None:
            raise WebhooksOff
        event_id, event = self._verified(body, headers)
        async with self._database.system_unit_of_work() as unit:
            connection = await unit.driver()
            if await connection.fetchval(_ONCE, SOURCE, event_id) is None:
                return
            await self._apply(unit, self._issuer, event)

    def _verified(self, body: bytes, headers: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
        wanted = {name: headers.get(name, "") for name in ("svix-id", "svix-timestamp", "svix-signature")}
        for secret in self._secrets:
            try:
                # Signature, and the time within five minutes.
                Webhook(secret).verify(body, wanted)
                event = orjson.loads(body)
            except Exception:  # noqa: BLE001, S112 - a malformed header is a ValueError, a body no UTF-8: all are one answer
                continue
            if isinstance(event, dict) and 0 < len(wanted["svix-id"]) <= 255 and wanted["svix-id"].isprintable():
                return wanted["svix-id"], event
        raise SignatureInvalid

    async def _apply(self, unit: UnitOfWork, issuer: Issuer, event: dict[str, Any]) -> None:
        kind, data = event.get("type"), event.get("data")
        subject = data.get("id") if isinstance(data, dict) else None
        if not isinstance(kind, str) or kind not in _KINDS or not isinstance(data, dict):
            return
        if not isinstance(subject, str) or not 0 < len(subject) <= 255 or not subject.isprintable():
            return
        moment = _moment(data.get("updated_at") or event.get("timestamp"))
        connection = await unit.driver()
        await connection.execute(_LOCK, f"{issuer.name}|{subject}")
        known = await connection.fetchrow(_FIND, issuer.name, subject)
        if kind == "user.deleted":
            await self._delete(unit, issuer, subject, known["user_id"] if known else None, moment)
        elif known is None:
            if issuer.create_users:
                try:
                    await self._users.add(unit, issuer, subject, _profile(data), updated_at=moment)
                except UserUnknown:
                    logger.info("a message about somebody who was erased", extra={"issuer": issuer.name})
        elif known["deleted_at"] is None and (known["updated_at"] is None or known["updated_at"] < moment):
            profile = _profile(data)
            await connection.execute(
                _UPDATE_USER, known["user_id"], profile.email, profile.name, profile.email_verified
            )
            await connection.execute(_SEEN, issuer.name, subject, moment)

    async def _delete(
        self, unit: UnitOfWork, issuer: Issuer, subject: str, user_id: UUID | None, moment: datetime
    ) -> None:
        connection = await unit.driver()
        await connection.execute(_TOMBSTONE, issuer.name, subject, moment, erased_subject(issuer.name, subject))
        if user_id is not None:
            await connection.execute(_DISABLE, user_id, moment)
            await self._revocations.announce(unit, Revocation("user", user_id))
            await record(
                unit, Action.IDENTITY_DELETED, user_id=user_id, actor="issuer", details={"issuer": issuer.name}
            )


def _clerk(issuers: tuple[Issuer, ...]) -> Issuer | None:
    """Return the entry that messages are about: the one named clerk, else the only RS256 one with parties."""
    named = [entry for entry in issuers if entry.name == SOURCE]
    alike = [entry for entry in issuers if entry.algorithm is Algorithm.RS256 and entry.azp]
    return named[0] if named else alike[0] if len(alike) == 1 else None


def _moment(value: object) -> datetime:
    """Read Clerk's milliseconds since 1970; what is none is now."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**14:
        return datetime.fromtimestamp(value / 1000, UTC)
    return clock.now()


def _profile(data: dict[str, Any]) -> Profile:
    addresses = data.get("email_addresses")
    primary: dict[str, Any] = {}
    for address in addresses if isinstance(addresses, list) else []:
        if isinstance(address, dict) and address.get("id") == data.get("primary_email_address_id"):
            primary = address
    verification = primary.get("verification")
    names = [data.get("first_name"), data.get("last_name")]
    return Profile.from_claims(
        {
            "email": primary.get("email_address"),
            "email_verified": isinstance(verification, dict) and verification.get("status") == "verified",
            "name": " ".join(name for name in names if isinstance(name, str)),
        }
    )
