"""Writes an image of a message in a form that goes into JSON."""

from base64 import b64encode

from parley.llm.ports import ImagePart


def as_base64(image: ImagePart) -> str:
    """Return the bytes as base64 text."""
    return b64encode(image.data).decode()


def as_data_url(image: ImagePart) -> str:
    """Return the image as a URL that holds it."""
    return f"data:{image.media_type};base64,{as_base64(image)}"
