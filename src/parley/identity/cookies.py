"""Cookies of browsers: the refresh token of a session in cookie mode, and the known device.

The access token stays in the page's memory; cookies are read by refresh, sign-out and sign-in alone. Those that set
or read a session's cookie want proof that our own page asks: a POST of JSON, our header, an Origin of the list, and no
`Sec-Fetch-Site: cross-site`.
"""

from dataclasses import dataclass
from urllib.parse import urlsplit

from fastapi import Request, Response

from parley.core.settings import Settings
from parley.identity.devices import LIFE
from parley.identity.errors import CsrfRefused
from parley.identity.schemas import SessionAnswer, TokenAnswer

HEADER = "X-Parley-Session"
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


@dataclass(frozen=True, slots=True)
class Cookies:
    """Sets, reads and guards the cookies of one service."""

    refresh_name: str
    device_name: str
    secure: bool
    origins: frozenset[str]
    allow_loopback: bool
    idle_s: int

    @classmethod
    def from_settings(cls, settings: Settings) -> "Cookies":
        """Return what suits the public address: without https, outside production, cookies cannot be `Secure`."""
        secure = settings.is_production or settings.base_url.startswith("https:")
        prefix = "__Host-" if secure else ""
        return cls(
            refresh_name=f"{prefix}parley_rt",
            device_name=f"{prefix}parley_device",
            secure=secure,
            origins=frozenset({settings.base_url, *settings.cors_origins}),
            allow_loopback=not settings.is_production,
            idle_s=settings.auth.refresh_idle_days * 86400,
        )

    def wanted(self, request: Request) -> bool:
        """Whether the request is in cookie mode. Raises `CsrfRefused` if it is and nothing proves where it is from."""
        if request.headers.get(HEADER, "").lower() != "cookie":
            return False
        self.guard(request)
        return True

    def guard(self, request: Request) -> None:
        """Raise `CsrfRefused` unless our own page sent the request."""
        headers = request.headers
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        ours = (
            headers.get(HEADER, "").lower() == "cookie"
            and (kind == "application/json" or not has_body)
            and self._origin_allowed(headers.get("origin"))
            and headers.get("sec-fetch-site", "same-origin").lower() != "cross-site"
        )
        if not ours:
            raise CsrfRefused

    def refresh_token(self, request: Request) -> str | None:
        """Return the refresh token of the cookie."""
        return request.cookies.get(self.refresh_name)

    def device(self, request: Request) -> str | None:
        """Return the proof of a known device."""
        return request.cookies.get(self.device_name)

    def keep(self, response: Response, answer: TokenAnswer) -> None:
        """Put a session's refresh token into its cookie. It may then stand in no body."""
        self._set(response, self.refresh_name, answer.refresh_token, max_age=self.idle_s)

    def remember_device(self, response: Response, proof: str) -> None:
        """Put the proof of a known device into its cookie."""
        self._set(response, self.device_name, proof, max_age=int(LIFE.total_seconds()))

    def forget(self, response: Response) -> None:
        """Take the refresh token away."""
        self._set(response, self.refresh_name, "", max_age=0)

    def _set(self, response: Response, name: str, value: str, *, max_age: int) -> None:
        response.set_cookie(
            name, value, max_age=max_age, path="/", secure=self.secure, httponly=True, samesite="strict"
        )

    def _origin_allowed(self, origin: str | None) -> bool:
        if origin is None:
            return False
        if origin in self.origins:
            return True
        try:
            parts = urlsplit(origin)
            return self.allow_loopback and parts.scheme in {"http", "https"} and parts.hostname in _LOOPBACK
        except ValueError:
            return False


def shown(answer: TokenAnswer, *, cookie: bool) -> SessionAnswer:
    """Return what the body of an answer holds."""
    return SessionAnswer.model_construct(
        **{**answer.__dict__, "refresh_token": None if cookie else answer.refresh_token}
    )
