"""What can happen in the chat."""

from parley.core.errors import Conflict, Invalid, NotFound, RateLimited


class ConversationNotFound(NotFound):
    """No such conversation, or someone else's."""

    message = "No such conversation."


class MessageNotFound(NotFound):
    """No such message in this conversation."""

    message = "No such message."


class ReplyNotFound(NotFound):
    """No such reply, or someone else's."""

    message = "No such reply."


class TooManyReplies(RateLimited):
    """As many replies of the caller's are being written or waiting as may be."""

    code = "too_many_replies"
    message = "Too many of your replies are being written. Wait for one to end."


class ReplyActive(Conflict):
    """A reply is being written and the caller asked not to wait."""

    code = "active_reply"
    frame_code = "active_reply"
    message = "A reply is being written in this conversation."


class CidReused(Invalid):
    """The idempotency key was used for something else."""

    code = "idempotency_key_reused"
    frame_code = "conflict"
    message = "This key was used for another message."
