"""What can happen to an approval."""

from parley.core.errors import Conflict, NotFound


class ToolCallNotFound(NotFound):
    """No such call that had to be approved, or someone else's."""

    message = "No such tool call."


class AlreadyDecided(Conflict):
    """Somebody was first with the other answer."""

    code = "already_decided"
    frame_code = "conflict"
    message = "This tool call was decided already, the other way."


class NoLongerWaiting(Conflict):
    """The time to answer is over, or the reply has ended."""

    code = "no_longer_waiting"
    frame_code = "conflict"
    message = "This tool call no longer waits for an answer."
