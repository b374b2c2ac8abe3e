"""What can happen to assistants."""

from parley.core.errors import Conflict, Forbidden, Invalid, NotFound


class AssistantNotFound(NotFound):
    """No such assistant, or another workspace's."""

    message = "No such assistant."


class UnknownAssistant(Invalid):
    """A conversation names an assistant that there is not."""

    message = "There is no such assistant."

    def __init__(self) -> None:
        super().__init__(details={"field": "assistant", "constraint": "known"})


class UnknownTools(Invalid):
    """An assistant names tools that there are not."""

    message = "There are no such tools."

    def __init__(self, field: str) -> None:
        super().__init__(details={"field": field, "constraint": "known"})


class NameTaken(Conflict):
    """Another assistant of the workspace, or a built-in one, has the name."""

    code = "assistant_name_taken"
    message = "Another assistant has this name."


class VersionIsOld(Conflict):
    """Somebody has changed the assistant since the caller read it."""

    code = "version_conflict"
    message = "This assistant was changed meanwhile. Read it again."


class TooManyAssistants(Conflict):
    """The workspace has as many as it may."""

    code = "too_many_assistants"
    message = "This workspace has as many assistants as it may have."


class NotYours(Forbidden):
    """Only whoever made an assistant and the workspace's admins change it."""

    message = "Only its maker and admins may change this assistant."
