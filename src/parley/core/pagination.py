"""Pages of a list."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Query

MAX_PER_PAGE = 100


@dataclass(frozen=True, slots=True)
class PageRequest:
    """Which page is asked for; counted from 1."""

    page: int
    per_page: int

    @property
    def offset(self) -> int:
        """How many rows come before this page."""
        return (self.page - 1) * self.per_page


async def _page_request(
    page: Annotated[int, Query(ge=1, le=1_000_000, description="Which page, from 1")] = 1,
    per_page: Annotated[int, Query(ge=1, le=MAX_PER_PAGE, description="Rows per page")] = 20,
) -> PageRequest:
    return PageRequest(page, per_page)


Page = Annotated[PageRequest, Depends(_page_request)]
