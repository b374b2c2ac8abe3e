"""Checks, and the sections of the protocol that they belong to."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from parley.conformance.bench import Bench

Body = Callable[[Bench], Awaitable[None]]


@dataclass(frozen=True)
class Check:
    """One thing to check. `id` stays the same for ever; `slow` ones run only when asked for."""

    section: str
    name: str
    says: str
    body: Body
    slow: bool = False
    limit_s: float | None = None

    @property
    def id(self) -> str:
        """The section and the name."""
        return f"{self.section}.{self.name}"


@dataclass
class Section:
    """The checks of one part of the protocol; the sentence of a check is its function's docstring."""

    name: str
    checks: list[Check] = field(default_factory=list)

    def check(self, *, slow: bool = False, limit_s: float | None = None) -> Callable[[Body], Body]:
        """Add a function as a check under its own name."""

        def add(body: Body) -> Body:
            says = (body.__doc__ or "").strip()
            name = body.__name__
            self.checks.append(Check(self.name, name, says, body, slow, limit_s))
            return body

        return add
