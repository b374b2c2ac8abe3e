"""Where a request comes from: for sessions, limits and the audit log."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

_ADDRESS_LENGTH = 45
_USER_AGENT_LENGTH = 400


@dataclass(frozen=True, slots=True)
class Origin:
    """The client's address, as far as proxies are trusted, and what it calls itself. Both None outside requests."""

    address: str | None = None
    user_agent: str | None = None


_NOWHERE = Origin()
_origin: ContextVar[Origin] = ContextVar("origin", default=_NOWHERE)


def current_origin() -> Origin:
    """Return the origin of the request that is being served."""
    return _origin.get()


@contextmanager
def origin(address: str | None, user_agent: str | None) -> Iterator[None]:
    """Serve a request that comes from there. Text that cannot be stored is cut and cleaned."""
    name = user_agent.replace("\x00", "")[:_USER_AGENT_LENGTH] if user_agent else None
    token = _origin.set(Origin(address[:_ADDRESS_LENGTH] if address else None, name or None))
    try:
        yield
    finally:
        _origin.reset(token)
