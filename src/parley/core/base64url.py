"""base64url (RFC 4648, section 5), in which the texts of our tokens are. Each value has one text and no other."""

import base64


def encode(raw: bytes) -> str:
    """Return the text of some bytes."""
    return base64.urlsafe_b64encode(raw).decode()


def decode(text: str) -> bytes:
    """Return the bytes of a text. Raises `ValueError` for any other text than `encode` makes of them.

    The standard library's decoder also takes `+` and `/`, and bits left over at the end: one token would have several
    texts.
    """
    raw = base64.b64decode(text.encode(), altchars=b"-_", validate=True)
    if encode(raw) != text:
        raise ValueError("not the text of these bytes")
    return raw
