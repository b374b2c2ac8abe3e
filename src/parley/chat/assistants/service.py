"""What members do with assistants, and what a reply is told of the one that gives it."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from uuid import UUID

from sqlalchemy.engine import RowMapping
from sqlalchemy.exc import IntegrityError

from parley.chat.assistants.errors import (
    NameTaken,
    NotYours,
    TooManyAssistants,
    UnknownAssistant,
    UnknownTools,
)
from parley.chat.assistants.models import Assistant
from parley.chat.assistants.repository import LIMIT, AssistantRepository
from parley.chat.assistants.schemas import (
    AssistantCreate,
    AssistantRead,
    AssistantUpdate,
    Parameters,
    ParametersRead,
    PromptRead,
)
from parley.chat.assistants.types import BUILT_IN, DEFAULT, ApprovalMode, BuiltIn, Profile
from parley.core.db import Database, UnitOfWork
from parley.core.scope import Scope
from parley.llm.prompts import FEATURES, PromptLibrary, RenderedPrompt
from parley.llm.registry import ModelRegistry
from parley.realtime.runs import Run
from parley.tenancy.audit import Action, record
from parley.tenancy.permissions import Permission

_NAMES = frozenset(one.name for one in BUILT_IN)


def own_id(reference: str) -> UUID | None:
    """Return the id that a reference to a workspace's own assistant is, or None for a name."""
    try:
        return UUID(reference)
    except ValueError:
        return None


class Assistants:
    """The assistants as one process knows them. Tools and models are what they are checked against."""

    def __init__(
        self,
        database: Database,
        prompts: PromptLibrary,
        models: Callable[[Scope], ModelRegistry],
        tools: frozenset[str],
    ) -> None:
        self._database = database
        self._prompts = prompts
        self._models = models
        self._tools = tools
        # One whose module is not there has nothing to work with.
        self.built_in = tuple(one for one in BUILT_IN if one.tools is None or one.tools <= tools)
        self._by_name = {one.name: one for one in BUILT_IN}

    async def profile_of(self, run: Run) -> Profile:
        """Return what a reply goes by.

        An assistant that is gone by now leaves the reply to the general one, without tools: which of them it allowed,
        and which it asked for, went with it.
        """
        name = run.options.get("assistant", DEFAULT)
        id_ = own_id(name)
        if id_ is None:
            return self._built_in(name)
        row, run.assistant = run.assistant, None
        if row is None:
            async with self._database.unit_of_work(run.scope) as unit:
                row = await AssistantRepository(unit, run.scope).find(id_)
        return replace(self._built_in(DEFAULT), tools=frozenset()) if row is None else _own(id_, row)

    def _built_in(self, name: str) -> Profile:
        one = self._by_name.get(name)
        if one is None:
            return Profile(self._prompts.render(f"chat/{name}"))
        return Profile(self._prompts.render(one.prompt), tools=one.tools, approval=one.approval)

    def describe(self, one: BuiltIn) -> AssistantRead:
        """Return a built-in assistant as callers see it."""
        prompt = self._prompts.render(one.prompt)
        return AssistantRead(
            id=None, name=one.name, title=one.title, description=one.description, built_in=True, instructions=None,
            prompt=prompt.path, sha256=prompt.sha256, model=None, tools=sorted(one.tools) if one.tools else None,
            approval=one.approval, approval_tools=[], created_by=None, version=1, created_at=None, updated_at=None,
            parameters=ParametersRead(temperature=None, max_output_tokens=None),
        )  # fmt: skip

    def prompts(self) -> list[PromptRead]:
        """Return the prompt files, and what uses each."""
        return [
            PromptRead(
                path=path,
                sha256=sha256,
                assistants=[one.name for one in self.built_in if one.prompt == use],
                features=[FEATURES[use]] if use in FEATURES else [],
            )
            for use, path, sha256 in self._prompts.files
        ]

    def check(self, scope: Scope, values: Mapping[str, Any]) -> None:
        """Raise for tools and models that there are not."""
        for field in ("tools", "approval_tools"):
            if set(values.get(field) or ()) - self._tools:
                raise UnknownTools(field)
        if values.get("model") is not None:
            self._models(scope).resolve(values["model"])


class AssistantService:
    """What a member does with assistants, inside one unit of work."""

    def __init__(self, unit: UnitOfWork, scope: Scope, assistants: Assistants) -> None:
        self._unit = unit
        self._scope = scope
        self._assistants = assistants
        self._repository = AssistantRepository(unit, scope)

    async def list(self) -> list[AssistantRead]:
        """Return the built-in assistants, then the workspace's own by name."""
        built_in = [self._assistants.describe(one) for one in self._assistants.built_in]
        return [*built_in, *(_read(row) for row in await self._repository.list())]

    async def get(self, id: UUID) -> AssistantRead:
        """Return one of the workspace's own, or raise."""
        return _read(await self._repository.get(id))

    async def resolve(self, reference: str) -> str:
        """Return how a conversation is to name an assistant: a built-in one's name, or the id of an own one.

        Raises `UnknownAssistant`.
        """
        if any(one.name == reference for one in self._assistants.built_in):
            return reference
        id_ = own_id(reference)
        found = await (self._repository.find(id_) if id_ else self._repository.find_named(reference))
        if found is None:
            raise UnknownAssistant
        return str(found["id"])

    async def create(self, wanted: AssistantCreate) -> AssistantRead:
        """Make an assistant. Raises `NameTaken`, `TooManyAssistants`, `UnknownTools`, `UnknownModel`."""
        values = _values(wanted.model_dump(exclude={"parameters"}), wanted.parameters)
        self._assistants.check(self._scope, values)
        await self._name_is_free(wanted.name)
        if await self._repository.count() >= LIMIT:
            raise TooManyAssistants
        try:
            row = await self._repository.add(
                Assistant(
                    workspace_id=self._scope.workspace_id, created_by=self._scope.user_id, version=1, **values
                )
            )  # fmt: skip
        except IntegrityError as error:
            # Two at the same moment.
            raise NameTaken from error
        await record(self._unit, Action.ASSISTANT_CREATED, scope=self._scope, target=str(row.id))
        return _read(row.model_dump())

    async def change(self, id: UUID, wanted: AssistantUpdate) -> AssistantRead:
        """Change what is named. Raises `AssistantNotFound`, `NotYours`, `VersionIsOld`, and what `create` raises."""
        await self._mine(id)
        values = _values(wanted.model_dump(exclude_unset=True, exclude={"version", "parameters"}), wanted.parameters)
        self._assistants.check(self._scope, values)
        if wanted.name is not None:
            await self._name_is_free(wanted.name, but=id)
        try:
            row = await self._repository.update(id, values, version=wanted.version)
        except IntegrityError as error:
            raise NameTaken from error
        details = {"fields": sorted(values)}
        await record(self._unit, Action.ASSISTANT_CHANGED, scope=self._scope, target=str(id), details=details)
        return _read(row)

    async def delete(self, id: UUID) -> None:
        """Remove an assistant; its conversations go on with the general one, without tools. Raises as `change` does."""
        await self._mine(id)
        await self._repository.delete(id)
        await record(self._unit, Action.ASSISTANT_DELETED, scope=self._scope, target=str(id))

    async def _mine(self, id: UUID) -> None:
        row = await self._repository.get(id, lock=True)
        if row["created_by"] != self._scope.user_id and Permission.ASSISTANTS_MANAGE not in self._scope.permissions:
            raise NotYours

    async def _name_is_free(self, name: str, *, but: UUID | None = None) -> None:
        found = await self._repository.find_named(name)
        if name in _NAMES or (found is not None and found["id"] != but):
            raise NameTaken


def _values(values: dict[str, Any], parameters: Parameters | None) -> dict[str, Any]:
    """Return columns of what was sent."""
    if values.get("approval") is not None:
        values["approval"] = str(values["approval"])
    if parameters is not None:
        values["parameters"] = parameters.model_dump(exclude_none=True)
    return values


def _sha256(instructions: str) -> str:
    return hashlib.sha256(instructions.encode()).hexdigest()


def _own(id: UUID, row: Mapping[str, Any] | RowMapping) -> Profile:
    parameters = row["parameters"]
    # Text and nothing else: no template is made of what a member writes.
    prompt = RenderedPrompt(text=row["instructions"], path=f"assistant:{id}", sha256=_sha256(row["instructions"]))
    return Profile(
        prompt,
        tools=None if row["tools"] is None else frozenset(row["tools"]),
        approval=ApprovalMode(row["approval"]),
        approval_tools=frozenset(row["approval_tools"]),
        temperature=parameters.get("temperature"),
        max_output_tokens=parameters.get("max_output_tokens"),
    )


def _read(row: Mapping[str, Any] | RowMapping) -> AssistantRead:
    parameters = row["parameters"]
    return AssistantRead.model_validate(
        {
            **dict(row),
            "built_in": False,
            "prompt": f"assistant:{row['id']}",
            "sha256": _sha256(row["instructions"]),
            "parameters": {name: parameters.get(name) for name in ParametersRead.model_fields},
        }
    )
