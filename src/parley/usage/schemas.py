"""Usage and budgets as the API shows and takes them."""

import re
from datetime import date, datetime
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Literal, Self
from uuid import UUID

from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator
from pydantic_core import PydanticCustomError

from parley.core.schemas import ReadModel, RequestModel
from parley.usage.periods import Period

MAX_BUDGETS = 500

_AMOUNT = re.compile(r"-?[0-9]+(\.[0-9]+)?", re.ASCII)
_DAY = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)


def _is_day(value: object) -> object:
    # Pydantic would take a number for seconds since 1970.
    if isinstance(value, str) and not _DAY.fullmatch(value):
        raise PydanticCustomError("day", "a day is written as in 2026-11-21")
    return value


def _is_amount(value: object) -> object:
    # Pydantic would take "1_000" and " 5".
    if isinstance(value, str) and not _AMOUNT.fullmatch(value):
        raise PydanticCustomError("amount", "an amount of dollars is written as in 25 or 0.50")
    return value


Day = Annotated[date, BeforeValidator(_is_day)]

# Dollars as text, all eight places: "0.00012300", never "1.23E-4".
Dollars = Annotated[Decimal, PlainSerializer(lambda value: f"{value:.8f}", return_type=str)]
Limit = Annotated[
    Decimal, Field(ge=0, le=Decimal(999_999_999), max_digits=18, decimal_places=8), BeforeValidator(_is_amount)
]


class GroupBy(StrEnum):
    """What a row of usage is about."""

    DAY = "day"
    MODEL = "model"
    USER = "user"


class _UsageSum(ReadModel):
    calls: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    cost: Dollars


class UsageByDay(_UsageSum):
    """What was used on one day of UTC."""

    day: date


class UsageByModel(_UsageSum):
    """What was used of one model."""

    model: str


class UsageByUser(_UsageSum):
    """What one user used; null stands for those whose account was erased."""

    user_id: UUID | None


UsageRow = UsageByDay | UsageByModel | UsageByUser

Subject = Literal["workspace", "user", "api_key"]


class BudgetSet(RequestModel):
    """A budget: how many dollars a subject may spend in each day or month of UTC."""

    subject: Subject
    subject_id: UUID | None = Field(
        default=None, description="The user or the API key; left out for the workspace as a whole"
    )
    period: Period
    limit: Limit = Field(description="Dollars")
    alert_at: Annotated[Decimal, Field(gt=0, le=1, decimal_places=3)] = Field(
        default=Decimal("0.8"), description="The part of the limit at which people are told"
    )

    @model_validator(mode="after")
    def _named(self) -> Self:
        if (self.subject_id is None) != (self.subject == "workspace"):
            raise PydanticCustomError("subject_id", "a user or an API key has to be named, the workspace must not be")
        return self

    @property
    def key(self) -> tuple[UUID | None, UUID | None, str]:
        """What makes two budgets the same one: user, API key and period."""
        user = self.subject_id if self.subject == "user" else None
        return (user, self.subject_id if self.subject == "api_key" else None, self.period.value)


class BudgetsSet(RequestModel):
    """All budgets of a workspace: those that are left out are removed."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"budgets": [{"subject": "workspace", "period": "month", "limit": "100.00", "alert_at": "0.8"}]}
            ]
        }
    )

    budgets: list[BudgetSet] = Field(max_length=MAX_BUDGETS)


class BudgetRead(ReadModel):
    """A budget and how it stands in the period of now."""

    id: UUID
    subject: Subject
    subject_id: UUID | None
    period: Period
    limit: Dollars
    set_by: Literal["workspace", "operator"] = Field(
        description="`operator`: a ceiling of the installation over what its own provider keys are used for, which "
        "the workspace cannot change"
    )
    alert_at: Decimal
    spent: Dollars
    reserved: Dollars = Field(description="What calls that are being made may still cost")
    remaining: Dollars
    resets_at: datetime
