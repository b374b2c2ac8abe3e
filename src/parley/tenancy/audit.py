"""The audit log: who did what that touches access, from where, and how it went."""

from enum import StrEnum
from typing import Any, Final, Literal
from uuid import UUID

import orjson

from parley.core.db import UnitOfWork
from parley.core.ids import new_id
from parley.core.logging import current_request_id
from parley.core.origin import current_origin
from parley.core.scope import NO_WORKSPACE, Scope

_INSERT = """
    INSERT INTO audit_events (workspace_id, id, actor, user_id, credential_id, action, outcome, target,
                              address, user_agent, request_id, details)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
"""


class Action(StrEnum):
    """What is written down. The part before the dot is what it was done to."""

    ACCOUNT_CREATED = "account.created"
    ACCOUNT_DISABLED = "account.disabled"
    ACCOUNT_ENABLED = "account.enabled"
    ACCOUNT_EXPORT_REQUESTED = "account.export_requested"
    ACCOUNT_EXPORT_DOWNLOADED = "account.export_downloaded"
    ACCOUNT_ERASURE_REQUESTED = "account.erasure_requested"
    ACCOUNT_ERASED = "account.erased"
    EMAIL_VERIFIED = "email.verified"
    EMAIL_CHANGED = "email.changed"
    PASSWORD_CHANGED = "password.changed"  # noqa: S105 - a name
    PASSWORD_RESET_REQUESTED = "password.reset_requested"  # noqa: S105 - a name
    PASSWORD_RESET = "password.reset"  # noqa: S105 - a name
    SESSION_STARTED = "session.started"
    SESSION_REFUSED = "session.refused"
    SESSION_ENDED = "session.ended"
    SESSION_REVOKED = "session.revoked"
    SESSION_REUSED = "session.reused"
    SESSION_SWITCHED = "session.switched"
    IDENTITY_LINKED = "identity.linked"
    IDENTITY_DELETED = "identity.deleted"
    API_KEY_CREATED = "api_key.created"
    API_KEY_REVOKED = "api_key.revoked"
    PROVIDER_KEY_SET = "provider_key.set"
    PROVIDER_KEY_DELETED = "provider_key.deleted"
    WORKSPACE_CREATED = "workspace.created"
    WORKSPACE_RENAMED = "workspace.renamed"
    WORKSPACE_DELETED = "workspace.deleted"
    MEMBER_ADDED = "member.added"
    MEMBER_ROLE_CHANGED = "member.role_changed"
    MEMBER_REMOVED = "member.removed"
    INVITATION_CREATED = "invitation.created"
    INVITATION_REVOKED = "invitation.revoked"
    INVITATION_ACCEPTED = "invitation.accepted"
    BUDGETS_CHANGED = "budgets.changed"
    CEILINGS_CHANGED = "ceilings.changed"
    ASSISTANT_CREATED = "assistant.created"
    ASSISTANT_CHANGED = "assistant.changed"
    ASSISTANT_DELETED = "assistant.deleted"


Actor = Literal["user", "key", "issuer", "operator", "system", "anonymous"]
Outcome = Literal["success", "failure"]
_NO_DETAILS: Final[dict[str, Any]] = {}


async def record(
    unit: UnitOfWork,
    action: Action,
    *,
    scope: Scope | None = None,
    workspace_id: UUID | None = None,
    user_id: UUID | None = None,
    credential_id: UUID | None = None,
    actor: Actor | None = None,
    outcome: Outcome = "success",
    target: str | None = None,
    details: dict[str, Any] = _NO_DETAILS,
) -> None:
    """Write one event in the unit's transaction.

    `scope` fills in workspace, user, credential and actor; each can be given by itself, before there is a scope.
    Without a workspace the event is the installation's own, which operators see. `target` is an id, never a secret;
    neither are `details`.
    """
    if scope is not None:
        workspace_id = workspace_id or scope.workspace_id
        user_id = user_id or scope.user_id
        credential_id = credential_id or scope.session_id or scope.key_id
        actor = actor or ("key" if scope.key_id else "issuer" if scope.issuer else "user")
    origin = current_origin()
    connection = await unit.driver()
    await connection.execute(
        _INSERT,
        workspace_id or NO_WORKSPACE,
        new_id(),
        actor or ("user" if user_id else "anonymous"),
        user_id,
        credential_id,
        action.value,
        outcome,
        target,
        origin.address,
        origin.user_agent,
        current_request_id() or None,
        orjson.dumps(details, default=str).decode(),
    )
