"""Sets, lists and removes a workspace's own keys of providers."""

import re
from urllib.parse import urlsplit

from parley.core.db import UnitOfWork
from parley.core.outgoing import DestinationRefused
from parley.core.revocations import Revocation, Revocations
from parley.core.scope import Scope
from parley.llm.errors import ProviderKeyInvalid, ProviderNotFound
from parley.llm.models import ProviderKey
from parley.llm.provider_key_repository import ProviderKeyRepository
from parley.llm.provider_key_schemas import ProviderKeyRead, ProviderKeySet
from parley.llm.provider_keys import ProviderKeys, StoredKey, origin
from parley.llm.registry import ModelEntry, ModelRegistry
from parley.tenancy.audit import Action, record

# What can stand in a header: anything else would be refused by the client, with the key in the error.
_KEY = re.compile(r"[!-~]{8,1000}", re.ASCII)
_TELLING = 16
"""Of a shorter key the last four characters would say too much."""


class ProviderKeyService:
    """The keys of the scope's workspace, inside one unit of work. `registry` is the operator's."""

    def __init__(
        self, unit: UnitOfWork, scope: Scope, keys: ProviderKeys, registry: ModelRegistry, revocations: Revocations
    ) -> None:
        self._unit = unit
        self._scope = scope
        self._keys = keys
        self._registry = registry
        self._revocations = revocations
        self._repository = ProviderKeyRepository(unit, scope)

    async def list(self) -> list[ProviderKeyRead]:
        """Return every provider that the workspace may have a key for, with what is known of the key that it has."""
        rows = {row["provider"]: ProviderKey(**row) for row in await self._repository.list()}
        known = self._providers()
        return [self._read(name, known.get(name), rows.get(name)) for name in sorted(known.keys() | rows.keys())]

    async def set(self, provider: str, wanted: ProviderKeySet) -> ProviderKeyRead:
        """Store a key in place of the one before it, for the URL that comes with it or else the operator's.

        Raises `ProviderNotFound`, and `ProviderKeyInvalid` for a key or a URL that cannot be taken.
        """
        entry = self._providers().get(provider)
        if entry is None:
            raise ProviderNotFound
        key = wanted.key.get_secret_value().strip()
        if not _KEY.fullmatch(key):
            raise ProviderKeyInvalid("A key is 8 to 1000 visible characters.", details={"field": "key"})
        base_url = None if wanted.base_url is None else self._own_url(entry, wanted.base_url)
        if base_url is None and not entry.base_url:
            raise ProviderKeyInvalid("This provider has no URL here: give one.", details={"field": "base_url"})
        stored = StoredKey(self._scope.workspace_id, provider, b"", base_url, base_url or origin(entry.base_url))
        sealed = self._keys.vault.seal(key, stored.bound_to)
        row = await self._repository.set(
            ProviderKey(
                workspace_id=self._scope.workspace_id,
                provider=provider,
                sealed=sealed,
                last_four=key[-4:] if len(key) >= _TELLING else "",
                base_url=base_url,
                given_for=stored.given_for,
                created_by=self._scope.user_id,
            )
        )
        # Of a URL only the host: a path can hold what is no one else's to know.
        details = {"last_four": row["last_four"], "host": urlsplit(base_url).netloc if base_url else None}
        await record(self._unit, Action.PROVIDER_KEY_SET, scope=self._scope, target=provider, details=details)
        new = StoredKey(stored.workspace_id, provider, sealed, base_url, stored.given_for)
        await self._tell(provider, new)
        return self._read(provider, entry, ProviderKey(**row))

    async def delete(self, provider: str) -> None:
        """Remove a key, at once and everywhere. Raises `ProviderKeyNotFound`."""
        await self._repository.remove(provider)
        await record(self._unit, Action.PROVIDER_KEY_DELETED, scope=self._scope, target=provider)
        await self._tell(provider, None)

    async def _tell(self, provider: str, stored: StoredKey | None) -> None:
        workspace_id = self._scope.workspace_id
        self._unit.after_commit(lambda: self._keys.changed(workspace_id, provider, stored))
        await self._revocations.announce(self._unit, Revocation("provider_keys", workspace_id))

    def _own_url(self, entry: ModelEntry, url: str) -> str:
        if not entry.workspace_urls:
            raise ProviderKeyInvalid(
                "The operator does not allow URLs of your own for this provider.", details={"field": "base_url"}
            )
        try:
            return self._keys.guard.check_base(url).url
        except DestinationRefused as refused:
            said = str(refused)
            raise ProviderKeyInvalid(f"{said[:1].upper()}{said[1:]}.", details={"field": "base_url"}) from None

    def _providers(self) -> dict[str, ModelEntry]:
        """The providers that workspaces may have keys for, each by one of its models."""
        return {entry.provider: entry for entry in self._registry.entries() if entry.workspace_keys}

    def _read(self, provider: str, entry: ModelEntry | None, row: ProviderKey | None) -> ProviderKeyRead:
        problem = None
        if row is not None:
            stored = StoredKey(row.workspace_id, provider, row.sealed, row.base_url, row.given_for)
            problem = self._keys.problem(entry, stored)
        return ProviderKeyRead(
            provider=provider,
            urls_allowed=entry is not None and entry.workspace_urls,
            is_set=row is not None,
            last_four=row.last_four if row else None,
            base_url=row.base_url if row else None,
            created_by=row.created_by if row else None,
            created_at=row.created_at if row else None,
            updated_at=row.updated_at if row else None,
            problem=problem,
        )
