"""What was used, by day, model or user: read from the ledger, as JSON or as CSV."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any
from uuid import UUID

from parley.core import clock
from parley.core.db import UnitOfWork
from parley.core.errors import Forbidden, Invalid
from parley.core.scope import Scope
from parley.tenancy.permissions import Permission
from parley.usage.ledger import Purpose
from parley.usage.schemas import GroupBy, UsageByDay, UsageByModel, UsageByUser, UsageRow

MAX_DAYS = 366
MAX_ROWS = 10_000
_DEFAULT_DAYS = 30

_COLUMN = {
    GroupBy.DAY: "(started_at AT TIME ZONE 'UTC')::date",
    GroupBy.MODEL: "model",
    GroupBy.USER: "user_id",
}
_ORDER = {GroupBy.DAY: "1", GroupBy.MODEL: "6 DESC, 1", GroupBy.USER: "6 DESC, 1"}
_SUM = """
    SELECT {column} AS key, count(*) AS calls, sum(input_tokens)::bigint AS input_tokens,
           sum(cached_tokens)::bigint AS cached_tokens, sum(output_tokens)::bigint AS output_tokens, sum(cost) AS cost
    FROM usage_entries
    WHERE workspace_id = $1
      AND started_at >= $2::date::timestamp AT TIME ZONE 'UTC' AND started_at < $3::date::timestamp AT TIME ZONE 'UTC'
      AND ($4::uuid IS NULL OR user_id = $4) AND ($5::uuid IS NULL OR key_id = $5)
      AND ($6::text IS NULL OR model = $6) AND ($7::text IS NULL OR purpose = $7)
    GROUP BY 1 ORDER BY {order} LIMIT {limit}
"""
_STATEMENTS = {group: _SUM.format(column=_COLUMN[group], order=_ORDER[group], limit=MAX_ROWS) for group in GroupBy}
_NAMES = {GroupBy.DAY: "day", GroupBy.MODEL: "model", GroupBy.USER: "user_id"}
_KINDS: dict[GroupBy, type[UsageRow]] = {
    GroupBy.DAY: UsageByDay,
    GroupBy.MODEL: UsageByModel,
    GroupBy.USER: UsageByUser,
}
# With one of these at its beginning a spreadsheet takes a cell for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """Which part of the ledger is meant. Both days belong to it; the last 30 days by default."""

    group_by: GroupBy
    first: date | None = None
    last: date | None = None
    model: str | None = None
    user_id: UUID | None = None
    key_id: UUID | None = None
    purpose: Purpose | None = None


class UsageReports:
    """Sums over the ledger, inside one unit of work."""

    def __init__(self, unit: UnitOfWork, scope: Scope) -> None:
        self._unit = unit
        self._scope = scope

    async def read(self, query: UsageQuery) -> Sequence[UsageRow]:
        """Return the sums: days in order, models and users the dearest first.

        Whoever may not see everybody's sees their own; asking for another's is `Forbidden`. Raises `Invalid` for days
        that are in the wrong order or too many.
        """
        user_id = query.user_id
        if Permission.USAGE_READ_ALL not in self._scope.permissions:
            if user_id not in {None, self._scope.user_id}:
                raise Forbidden(details={"permission": Permission.USAGE_READ_ALL.value})
            user_id = self._scope.user_id
        first, last = _days(query)
        connection = await self._unit.driver()
        rows = await connection.fetch(
            _STATEMENTS[query.group_by], self._scope.workspace_id, first, last + timedelta(days=1), user_id,
            query.key_id, query.model, query.purpose,
        )  # fmt: skip
        kind, name = _KINDS[query.group_by], _NAMES[query.group_by]
        return [kind.model_validate({name: row["key"], **dict(row)}) for row in rows]


def as_csv(rows: Sequence[UsageRow], group_by: GroupBy) -> str:
    """Return rows as CSV (RFC 4180) with a header. No cell can be taken for a formula."""
    names = [_NAMES[group_by], "calls", "input_tokens", "cached_tokens", "output_tokens", "cost"]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(names)
    for row in rows:
        values = row.model_dump(mode="json")
        writer.writerow([cell(values[name]) for name in names])
    return text.getvalue()


def cell(value: Any) -> str:
    """Return a cell's text; one that a spreadsheet would calculate gets an apostrophe, which makes it text."""
    text = "" if value is None else str(value)
    return f"'{text}" if text.startswith(_FORMULA) else text


def _days(query: UsageQuery) -> tuple[date, date]:
    last = query.last or max(clock.now().date(), query.first or date.min)
    first = query.first or date.fromordinal(max(last.toordinal() - _DEFAULT_DAYS + 1, 1))
    if first > last:
        raise Invalid("`from` is after `to`.", details={"field": "from", "constraint": "not after to"})
    if last - first >= timedelta(days=MAX_DAYS) or last == date.max:
        raise Invalid(
            f"At most {MAX_DAYS} days at once.", details={"field": "from", "constraint": f"at most {MAX_DAYS} days"}
        )
    return first, last
