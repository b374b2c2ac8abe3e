"""What can happen in the chat."""

from parley.core.errors import Conflict, Forbidden, Invalid, NotFound, RateLimited


class ConversationNotFound(NotFound):
    """No such conversation, or someone else's."""

    message = "No such conversation."


class MessageNotFound(NotFound):
    """No such message in this conversation."""

    message = "No such message."


class NotAQuestion(Conflict):
    """Only what a user said can be edited."""

    message = "Only a message of a user can be edited. Regenerate a reply instead."


class ReadOnly(Forbidden):
    """The conversation is shared with the caller to be read."""

    message = "You may read this conversation, not write in it."


class NotTheOwner(Forbidden):
    """Only the conversation's owner may do this."""

    message = "Only its owner may do this."


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
