"""Who may do what: the one table of permissions. Every route, frame and channel names the one that it asks for."""

from enum import StrEnum
from functools import cache
from typing import Any, Final

from parley.core.scope import PERMISSION_KEY, Role


class Permission(StrEnum):
    """Something that can be allowed. Those in `KEY_SCOPES` can be given to API keys, under the same name."""

    TASKS_READ = "tasks:read"
    TASKS_WRITE = "tasks:write"
    CHAT_READ = "chat:read"
    CHAT_WRITE = "chat:write"
    ASSISTANTS_WRITE = "assistants:write"
    ASSISTANTS_MANAGE = "assistants:manage"
    PROMPTS_READ = "prompts:read"
    MODELS_READ = "models:read"
    MODELS_CALL = "models:call"
    REALTIME_CONNECT = "realtime:connect"
    JOBS_READ = "jobs:read"
    USAGE_READ = "usage:read"
    USAGE_READ_ALL = "usage:read_all"
    BUDGETS_MANAGE = "budgets:manage"
    PROFILE_READ = "profile:read"
    ACCOUNT_MANAGE = "account:manage"
    WORKSPACES_READ = "workspaces:read"
    WORKSPACES_CREATE = "workspaces:create"
    WORKSPACE_UPDATE = "workspace:update"
    WORKSPACE_DELETE = "workspace:delete"
    MEMBERS_READ = "members:read"
    MEMBERS_MANAGE = "members:manage"
    KEYS_MANAGE = "keys:manage"
    PROVIDER_KEYS_MANAGE = "provider_keys:manage"
    PROVIDERS_READ = "providers:read"
    AUDIT_READ = "audit:read"


PERMISSIONS: Final[dict[Permission, Role]] = {
    # A viewer reads what is shared, and owns tasks.
    Permission.TASKS_READ: Role.VIEWER,
    Permission.TASKS_WRITE: Role.VIEWER,
    Permission.CHAT_READ: Role.VIEWER,
    Permission.MODELS_READ: Role.VIEWER,
    Permission.REALTIME_CONNECT: Role.VIEWER,
    Permission.JOBS_READ: Role.VIEWER,
    # One's own calls of models, and the budgets that bind one.
    Permission.USAGE_READ: Role.VIEWER,
    Permission.PROFILE_READ: Role.VIEWER,
    # One's own account, whatever the role here: password, sessions, export, the other workspaces.
    Permission.ACCOUNT_MANAGE: Role.VIEWER,
    Permission.WORKSPACES_READ: Role.VIEWER,
    Permission.WORKSPACES_CREATE: Role.VIEWER,
    Permission.MEMBERS_READ: Role.VIEWER,
    Permission.CHAT_WRITE: Role.MEMBER,
    # One's own assistants. What they are told is what everyone's chat with them goes by: not a part of `chat:write`.
    Permission.ASSISTANTS_WRITE: Role.MEMBER,
    Permission.PROMPTS_READ: Role.MEMBER,
    Permission.ASSISTANTS_MANAGE: Role.ADMIN,
    Permission.MODELS_CALL: Role.MEMBER,
    Permission.WORKSPACE_UPDATE: Role.ADMIN,
    Permission.MEMBERS_MANAGE: Role.ADMIN,
    Permission.KEYS_MANAGE: Role.ADMIN,
    Permission.PROVIDER_KEYS_MANAGE: Role.ADMIN,
    Permission.PROVIDERS_READ: Role.ADMIN,
    Permission.AUDIT_READ: Role.ADMIN,
    Permission.USAGE_READ_ALL: Role.ADMIN,
    Permission.BUDGETS_MANAGE: Role.ADMIN,
    Permission.WORKSPACE_DELETE: Role.OWNER,
}
"""The least role that has each permission. A later role has all that an earlier one has."""

KEY_SCOPES: Final = frozenset(
    {
        Permission.TASKS_READ,
        Permission.TASKS_WRITE,
        Permission.CHAT_READ,
        Permission.CHAT_WRITE,
        Permission.ASSISTANTS_WRITE,
        Permission.ASSISTANTS_MANAGE,
        Permission.PROMPTS_READ,
        Permission.MODELS_READ,
        Permission.MODELS_CALL,
        Permission.REALTIME_CONNECT,
        Permission.JOBS_READ,
        Permission.USAGE_READ,
        Permission.USAGE_READ_ALL,
        Permission.PROFILE_READ,
    }
)
"""What an API key may be given: never the account, the members or the keys."""


def needs(permission: Permission) -> dict[str, Any]:
    """Return what a route declares as `openapi_extra`: the caller must have this permission."""
    return {PERMISSION_KEY: permission.value}


@cache
def permissions_of(role: Role) -> frozenset[str]:
    """Return everything that a role may do."""
    return frozenset(permission.value for permission, least in PERMISSIONS.items() if role.at_least(least))
