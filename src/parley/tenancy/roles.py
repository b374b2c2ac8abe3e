"""Who may give, take and change which role: one rule."""

from parley.core.scope import Role


def may_change(actor: Role, before: Role | None, after: Role | None) -> bool:
    """Whether someone with a role may make a member of `before` one of `after`.

    `before` is None for somebody new, `after` for somebody who is removed. Admins manage everyone but owners; owners
    alone make and unmake owners.
    """
    if not actor.at_least(Role.ADMIN):
        return False
    return actor is Role.OWNER or Role.OWNER not in {before, after}
