"""E-mail addresses: what we take for one, and the form in which two of them are the same."""

import re
import unicodedata

from parley.identity.errors import EmailInvalid

MAX_LENGTH = 320
# Deliberately plain: whether an address exists only a mail to it tells. No quoted local parts, no address literals.
_LABEL = r"[^\W_](?:(?:[^\W_]|-){0,61}[^\W_])?"
_ADDRESS = re.compile(rf"""[^\s@<>()\[\]\\,;:"]{{1,64}}@(?=.{{1,255}}\Z){_LABEL}(?:\.{_LABEL})+""")


def _fold(email: str) -> str:
    """Return the form that look-ups compare: NFKC and case-folded, so that no second account looks the same."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", email.strip()).casefold())


def parse(email: str) -> tuple[str, str]:
    """Return the address as given, without the spaces around it, and folded. Raises `EmailInvalid`."""
    given = email.strip()
    if len(given) > MAX_LENGTH:
        raise EmailInvalid
    folded = _fold(given)
    # The folded form too: NFKC turns a full-width `＠` into the real one.
    for form in (given, folded):
        local = form.partition("@")[0]
        dotted = local.startswith(".") or local.endswith(".") or ".." in local
        if len(form) > MAX_LENGTH or dotted or not form.isprintable() or not _ADDRESS.fullmatch(form):
            raise EmailInvalid
    return given, folded
