"""What every answer tells browsers, and the policies of the few pages that there are."""

import base64
import hashlib
import re

from starlette.types import Message

# An answer of the API is data: nothing in it may be run, framed or taken for another kind.
API_POLICY = "default-src 'none'; frame-ancestors 'none'"

_INLINE_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)


def page_policy(page: str, *, workers: bool = False) -> str:
    """Return the policy of a page of ours: files of our own, and the scripts that stand in it, by their hashes.

    `workers`: it starts some from scripts that it makes itself.
    """
    scripts = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in _INLINE_SCRIPT.findall(page)
    )
    parts = [
        "default-src 'none'",
        f"script-src 'self' {scripts}".strip(),
        # Swagger UI and ReDoc write styles into their pages.
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data:",
        "font-src 'self' data:",
        "connect-src 'self'",
        *(["worker-src blob:", "child-src blob:"] if workers else []),
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    return "; ".join(parts)


class SecurityHeaders:
    """Adds to the answers what they lack. Encoded once."""

    def __init__(self, *, https: bool) -> None:
        self._always = [
            (b"x-content-type-options", b"nosniff"),
            (b"x-frame-options", b"DENY"),
            (b"referrer-policy", b"no-referrer"),
            (b"cross-origin-opener-policy", b"same-origin"),
            *([(b"strict-transport-security", b"max-age=31536000; includeSubDomains")] if https else []),
        ]
        self._policy = (b"content-security-policy", API_POLICY.encode())
        self._no_store = (b"cache-control", b"no-store")

    def add(self, message: Message, *, private: bool) -> None:
        """Add to the start of an answer. `private`: it was made for one caller and is kept nowhere."""
        headers = message.setdefault("headers", [])
        has_policy = has_cache = False
        for name, _ in headers:
            has_policy = has_policy or name == b"content-security-policy"
            has_cache = has_cache or name == b"cache-control"
        headers.extend(self._always)
        if not has_policy:
            headers.append(self._policy)
        if private and not has_cache:
            headers.append(self._no_store)
