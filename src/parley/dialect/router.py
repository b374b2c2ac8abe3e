"""OpenAI's paths. Bodies and errors are OpenAI's too, so nothing here is in our own document."""

from typing import Annotated

import orjson
from fastapi import APIRouter, Depends, Request, Response

from parley.core.scope import CurrentScope
from parley.dialect.answer import Completion
from parley.dialect.service import Dialect
from parley.tenancy.permissions import Permission, needs

router = APIRouter(tags=["openai"], include_in_schema=False)

_CALL = needs(Permission.MODELS_CALL)


async def _dialect(request: Request) -> Dialect:
    dialect: Dialect = request.app.state.dialect
    return dialect


DialectDep = Annotated[Dialect, Depends(_dialect)]


@router.post("/chat/completions", response_class=Response, openapi_extra=_CALL)
async def create_chat_completion(request: Request, scope: CurrentScope, dialect: DialectDep) -> Response:
    """Answer a conversation that the caller keeps."""
    return Completion(request, scope, dialect)


@router.get("/models", response_class=Response, openapi_extra=_CALL)
async def list_dialect_models(scope: CurrentScope, dialect: DialectDep) -> Response:
    """List the models and aliases that can be called now."""
    return _json({"object": "list", "data": dialect.models(scope)})


@router.get("/models/{model_id:path}", response_class=Response, openapi_extra=_CALL)
async def get_dialect_model(model_id: str, scope: CurrentScope, dialect: DialectDep) -> Response:
    """Get one of them."""
    return _json(dialect.model(scope, model_id))


def _json(value: object) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
