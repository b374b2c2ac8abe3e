"""The search over HTTP."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Response
from pydantic import AfterValidator

from parley.chat.search.repository import SearchRepository
from parley.chat.search.schemas import SearchHit
from parley.chat.search.service import SearchService
from parley.core.dependencies import RequestUnit
from parley.core.envelope import PageEnvelope, respond_page
from parley.core.pagination import Page
from parley.core.schemas import storable
from parley.core.scope import CurrentScope
from parley.tenancy.permissions import Permission, needs

router = APIRouter(tags=["chat"])


async def _search(unit: RequestUnit, scope: CurrentScope) -> SearchService:
    return SearchService(SearchRepository(unit, scope))


@router.get("/search", response_model=PageEnvelope[SearchHit], openapi_extra=needs(Permission.CHAT_READ))
async def search_conversations(
    q: Annotated[
        str,
        Query(
            min_length=1, max_length=200, description='Words, "phrases", -without, or; the last word may be a beginning'
        ),
        AfterValidator(storable),
    ],
    page: Page,
    service: Annotated[SearchService, Depends(_search)],
) -> Response:
    """Find words in titles and messages, of one's own conversations and of those that others share."""
    hits, total = await service.search(q, page)
    return respond_page(hits, page=page, total=total)
