"""Workspaces' own keys of providers, as calls need them: in memory, in every process, current within two seconds.

All of them are read when a process starts, those of one workspace when it is told that they changed, and all of them
again when it may have missed that. A call reads nothing from the database. They stay sealed in memory; opened is what
a call is being made with.
"""

import asyncio
import logging
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Final
from urllib.parse import urlsplit
from uuid import UUID

from parley.core.db import Database
from parley.core.outgoing import DestinationRefused, Guard
from parley.core.revocations import Revocation, Revocations
from parley.llm.provider_key_repository import UnscopedProviderKeys
from parley.llm.provider_key_vault import BoundTo, Vault
from parley.llm.registry import ModelEntry, ModelRegistry

logger = logging.getLogger(__name__)

UNREADABLE: Final = "this workspace's key for it can no longer be read; an admin has to set it again"
MOVED: Final = "the provider's address has changed since this workspace gave its key; an admin has to set it again"
NOT_ALLOWED: Final = "workspaces have no keys of their own for it any more"
URL_NOT_ALLOWED: Final = "the URL that this workspace has set for it is not allowed any more"

_BACK_OFF_S: Final = (0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A row of the table."""

    workspace_id: UUID
    provider: str
    sealed: bytes
    base_url: str | None
    given_for: str

    @property
    def bound_to(self) -> BoundTo:
        """What the key belongs to."""
        return BoundTo(self.workspace_id, self.provider, self.given_for, own_url=self.base_url is not None)


def origin(url: str) -> str:
    """Return scheme, host and port of an operator's URL: where a key goes that is given for it."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}".lower()


def _paused(operators: ModelRegistry, entry: ModelEntry) -> float | None:
    return operators.paused(entry)


class ProviderKeys:
    """The keys of every workspace, in this process."""

    def __init__(self, database: Database, vault: Vault, guard: Guard, revocations: Revocations) -> None:
        self.vault = vault
        self.guard = guard
        self._database = database
        self._keys: dict[UUID, dict[str, StoredKey]] = {}
        self._registries: dict[UUID, tuple[tuple[ModelEntry, ...], ModelRegistry]] = {}
        self._stale: set[UUID] = set()
        self._all_stale = False
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        revocations.subscribe(self._heard, reset=self._look_at_everything)

    # -- what calls ask ----------------------------------------------------------------------------------------------

    def registry_for(self, workspace_id: UUID, operators: ModelRegistry) -> ModelRegistry:
        """Return the models as a workspace may call them: the operator's own registry where it has no keys."""
        if workspace_id not in self._keys:
            return operators
        entries = operators.entries()
        known = self._registries.get(workspace_id)
        if known is None or [id(one) for one in known[0]] != [id(one) for one in entries]:
            # The operator's registry can be read anew at any time.
            own = tuple(self.entry_for(workspace_id, entry) for entry in entries)
            registry = ModelRegistry(own, operators.aliases, operators.providers)
            registry.paused = partial(_paused, operators)
            known = self._registries[workspace_id] = (entries, registry)
        return known[1]

    def entry_for(self, workspace_id: UUID, entry: ModelEntry) -> ModelEntry:
        """Return the entry to call for a workspace: with its own key, maybe at its own URL, where it has one.

        A key that cannot be used makes the entry unusable: the operator's would be spent in silence instead.
        """
        stored = self._keys.get(workspace_id, {}).get(entry.provider)
        if stored is None or not entry.workspace_keys:
            return entry
        problem = self.problem(entry, stored)
        key = None if problem else self.vault.open(stored.sealed, stored.bound_to)
        # A server that the operator asks without a key takes any, and is paid by the operator all the same.
        own_key = stored.base_url is not None or entry.api_key is not None or not entry.usable
        own = replace(entry, owner=workspace_id, own_key=own_key, api_key=key, unusable=problem)
        if stored.base_url is None:
            return own
        # The operator's headers stay behind: one of them may be a credential too.
        return replace(own, base_url=stored.base_url, headers={}, guarded=True)

    def problem(self, entry: ModelEntry | None, stored: StoredKey) -> str | None:
        """Return why a key cannot be used for a model of its provider (None: there is none); None when it can."""
        if entry is None or not entry.workspace_keys:
            return NOT_ALLOWED
        if stored.base_url is None:
            if origin(entry.base_url) != stored.given_for:
                return MOVED
        elif not entry.workspace_urls or not self._may_ask(stored.base_url):
            return URL_NOT_ALLOWED
        return UNREADABLE if self.vault.open(stored.sealed, stored.bound_to) is None else None

    def _may_ask(self, url: str) -> bool:
        try:
            self.guard.check_base(url)
        except DestinationRefused:
            return False
        return True

    # -- how they stay current ---------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Read all keys, then keep them current. Raises when the database cannot be read."""
        await self._read_all()
        self._task = asyncio.create_task(self._keep_current(), name="provider-keys")

    async def close(self) -> None:
        """Stop."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    def changed(self, workspace_id: UUID, provider: str, stored: StoredKey | None) -> None:
        """Take over a change of this process's own at once, when its transaction has committed."""
        keys = {name: key for name, key in self._keys.get(workspace_id, {}).items() if name != provider}
        self._put(workspace_id, keys if stored is None else {**keys, provider: stored})
        self._look_at(workspace_id)

    def _put(self, workspace_id: UUID, keys: Mapping[str, StoredKey]) -> None:
        self._registries.pop(workspace_id, None)
        if keys:
            self._keys[workspace_id] = dict(keys)
        else:
            self._keys.pop(workspace_id, None)

    def _heard(self, revocation: Revocation) -> None:
        if revocation.kind == "provider_keys" or (revocation.kind == "workspace" and revocation.id in self._keys):
            self._look_at(revocation.id)

    def _look_at(self, workspace_id: UUID) -> None:
        self._stale.add(workspace_id)
        self._wake.set()

    def _look_at_everything(self) -> None:
        self._all_stale = True
        self._wake.set()

    async def _keep_current(self) -> None:
        failures = 0
        while True:
            await self._wake.wait()
            self._wake.clear()
            everything, stale = self._all_stale, self._stale
            self._all_stale, self._stale = False, set()
            try:
                if everything:
                    await self._read_all()
                else:
                    await self._read(stale)
                failures = 0
            except Exception as error:  # noqa: BLE001 - whatever it is, a key that was taken back must go
                logger.warning("provider keys could not be read", extra={"cause": type(error).__name__})
                self._all_stale, self._stale = self._all_stale or everything, self._stale | stale
                self._wake.set()
                await asyncio.sleep(_BACK_OFF_S[min(failures, len(_BACK_OFF_S) - 1)])
                failures += 1

    async def _read(self, workspace_ids: Iterable[UUID]) -> None:
        for workspace_id in workspace_ids:
            async with self._database.system_unit_of_work() as unit:
                rows = await UnscopedProviderKeys(unit).of(workspace_id)
            # What this process changed since then is newer than what was read, and looked at once more.
            if workspace_id not in self._stale:
                self._put(workspace_id, {row["provider"]: StoredKey(**row) for row in rows})

    async def _read_all(self) -> None:
        async with self._database.system_unit_of_work() as unit:
            rows = await UnscopedProviderKeys(unit).all()
        found: dict[UUID, dict[str, StoredKey]] = {}
        for row in rows:
            found.setdefault(row["workspace_id"], {})[row["provider"]] = StoredKey(**row)
        for workspace_id in (self._keys.keys() | found.keys()) - self._stale:
            self._put(workspace_id, found.get(workspace_id, {}))
        await self._seal_anew(found)

    async def _seal_anew(self, keys: Mapping[UUID, Mapping[str, StoredKey]]) -> None:
        """Seal with the present secret what is sealed with a former one, so that that one can be given up."""
        for stored in (stored for mine in keys.values() for stored in mine.values()):
            if self.vault.is_current(stored.sealed):
                continue
            key = self.vault.open(stored.sealed, stored.bound_to)
            if key is None:
                logger.warning("a workspace's provider key cannot be read: `parley doctor` says more")
                continue
            sealed = self.vault.seal(key.get_secret_value(), stored.bound_to)
            async with self._database.system_unit_of_work() as unit:
                await UnscopedProviderKeys(unit).seal_anew(
                    stored.workspace_id, stored.provider, former=stored.sealed, sealed=sealed
                )
