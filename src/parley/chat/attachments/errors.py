"""What can happen with attachments."""

from parley.core.errors import Conflict, Invalid, NotFound, TooLarge


class AttachmentNotFound(NotFound):
    """No such attachment, someone else's, or one of another conversation."""

    message = "No such attachment, or it belongs to another conversation."


class AttachmentInUse(Conflict):
    """A message has it."""

    code = "attachment_in_use"
    message = "A message has this attachment. It goes with its conversation."


class AttachmentTooLarge(TooLarge):
    """More bytes or more pixels than may be."""


class UnsupportedType(Invalid):
    """The bytes are of no kind that is taken."""

    code = "unsupported_type"
    message = "Only PNG, JPEG, GIF and WebP images and text files in UTF-8 are taken."


class TypeMismatch(Invalid):
    """The bytes are not what the header or the name says."""

    code = "type_mismatch"
    message = "The content is not what the Content-Type or the name says."


class ImageDamaged(Invalid):
    """An image whose header cannot be read."""

    code = "image_damaged"
    message = "The image's header cannot be read."


class QuotaExceeded(Conflict):
    """The workspace has as many bytes as it may."""

    code = "quota_exceeded"
    message = "The workspace's room for files is used up."


class TooManyAttachments(Invalid):
    """More attachments in one message than are taken."""

    code = "too_many_attachments"
    message = "A message has too many attachments, or they are too large together."


class ModelSeesNoImages(Invalid):
    """The chosen model, or every model of the chosen alias, takes text only."""

    code = "model_without_images"
    message = "This model takes no images. GET /models lists those that do."
