"""The periods of budgets: days and months of UTC."""

from datetime import UTC, date, datetime, timedelta
from enum import StrEnum

from parley.core import clock


class Period(StrEnum):
    """How often a budget begins anew."""

    DAY = "day"
    MONTH = "month"


def starts_on(period: Period, at: datetime) -> date:
    """Return the first day of the period that a moment is in."""
    day = at.astimezone(UTC).date()
    return day if period is Period.DAY else day.replace(day=1)


def resets_at(period: Period, at: datetime) -> datetime:
    """Return when the period that a moment is in ends, and the next begins."""
    first = starts_on(period, at)
    # The 32nd day from the first is always in the next month.
    following = first + timedelta(days=1) if period is Period.DAY else (first + timedelta(days=31)).replace(day=1)
    return datetime(following.year, following.month, following.day, tzinfo=UTC)


def seconds_left(period: Period) -> int:
    """Return how many seconds the period of now still lasts, at least 1."""
    now = clock.now()
    return max(1, -int(-(resets_at(period, now) - now).total_seconds() // 1))
