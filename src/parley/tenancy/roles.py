"""Who may give, take and change which role: one rule."""

from collections.abc import Mapping
from uuid import UUID

from parley.core.scope import Role
from parley.tenancy.errors import LastOwner


def may_change(actor: Role, before: Role | None, after: Role | None) -> bool:
    """Whether someone with a role may make a member of `before` one of `after`.

    `before` is None for somebody new, `after` for somebody who is removed. Admins manage everyone but owners; owners
    alone make and unmake owners.
    """
    if not actor.at_least(Role.ADMIN):
        return False
    return actor is Role.OWNER or Role.OWNER not in {before, after}


def keep_an_owner(roles: Mapping[UUID, Role], user_id: UUID, after: Role | None) -> None:
    """Raise `LastOwner` if nobody would own the workspace once a member has another role, or none.

    `roles` has every owner in it, held until the transaction ends.
    """
    owners = {id_ for id_, role in roles.items() if role is Role.OWNER}
    if after is not Role.OWNER and owners == {user_id}:
        raise LastOwner
