"""Operator ceilings: what each workspace may spend on the installation's own provider keys, whatever its budgets say.

The settings hold for every workspace; an operator may give one workspace an amount of its own. Calls that are paid by a
workspace's own key are none of the operator's business and count for its budgets alone.
"""

from dataclasses import dataclass
from decimal import Decimal
from typing import Self

from parley.core.settings import LlmSettings


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the settings let each workspace spend in a day and in a month, in dollars; None where there is no bound."""

    day: Decimal | None = None
    month: Decimal | None = None

    @classmethod
    def from_settings(cls, settings: LlmSettings) -> Self:
        """Read them from the settings, where 0 is no bound."""
        return cls(settings.workspace_cost_per_day or None, settings.workspace_cost_per_month or None)

    def __bool__(self) -> bool:
        return self != Ceilings()


NO_CEILINGS = Ceilings()
