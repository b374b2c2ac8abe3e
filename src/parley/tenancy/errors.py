"""What can go wrong with workspaces and who belongs to them."""

from parley.core.errors import Conflict, Forbidden, NotFound, RateLimited


class WorkspaceNotFound(NotFound):
    """No such workspace, or not the one that the credential is for: the two look alike."""

    code = "workspace_not_found"
    message = "No such workspace."


class MemberNotFound(NotFound):
    """No such member of the workspace."""

    code = "member_not_found"
    message = "No such member."


class RoleNotAllowed(Forbidden):
    """The caller's role does not reach that far."""

    code = "role_not_allowed"
    message = "Your role does not allow this."


class LastOwner(Conflict):
    """A workspace has an owner, always."""

    code = "last_owner"
    message = "The workspace would have no owner. Make somebody else owner first, or delete it."


class TooManyWorkspaces(RateLimited):
    """Somebody makes one workspace after the other."""

    code = "too_many_workspaces"
    message = "You have made too many workspaces in the last 30 days."


class LastWorkspace(Conflict):
    """Somebody would be left without a workspace."""

    code = "last_workspace"
    message = "This is your only workspace. Make another one first, or delete your account."
