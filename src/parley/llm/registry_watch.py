"""Reads the registry file anew when it has changed. Each process looks for itself; none has to be told or restarted."""

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from parley.core.settings import LlmSettings
from parley.llm.errors import RegistryInvalid
from parley.llm.registry import ModelRegistry

logger = logging.getLogger(__name__)


class RegistryWatch:
    """Keeps a registry as its file is. A file that cannot be used changes nothing: the registry stays as it was.

    Calls that run keep the models that they have. Variables in the file have the values of the start: a key that is set
    later is seen after a restart.
    """

    def __init__(self, registry: ModelRegistry, path: Path, environ: Mapping[str, str], *, every_s: float) -> None:
        self._registry = registry
        self._path = path
        self._environ = environ
        self._every_s = every_s
        self._task: asyncio.Task[None] | None = None
        self._seen: tuple[int, int, int] | None = None
        self._digest = _digest(path)

    def start(self) -> None:
        """Begin to look; does nothing without an interval."""
        if self._every_s > 0:
            self._task = asyncio.create_task(self._loop(), name="registry-watch")

    async def close(self) -> None:
        """Stop."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def look(self) -> bool:
        """Look once; return whether the registry is another one now."""
        try:
            found = self._path.stat()
        except OSError:
            # Editors and deployments take a file away for a moment. One that is gone changes nothing either.
            return False
        seen = (found.st_mtime_ns, found.st_size, found.st_ino)
        if seen == self._seen:
            return False
        digest = await asyncio.to_thread(_digest, self._path)
        if digest is None:
            return False
        self._seen = seen
        if digest == self._digest:
            return False
        self._digest = digest
        try:
            fresh = await asyncio.to_thread(ModelRegistry.load, self._path, self._environ)
        except RegistryInvalid as problem:
            logger.error("The changed model registry is not used, the one before it is kept: %s", problem)  # noqa: TRY400
            return False
        self._registry.replace(fresh)
        logger.info("The model registry was read anew", extra={"models": len(fresh.entries())})
        return True

    async def _loop(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            try:
                await self.look()
            except Exception:
                logger.exception("the model registry could not be looked at")


@asynccontextmanager
async def watching(registry: ModelRegistry, llm: LlmSettings, environ: Mapping[str, str]) -> AsyncIterator[None]:
    """Keep a registry as its file is, for as long as this is open."""
    watch = RegistryWatch(registry, llm.registry, environ, every_s=llm.registry_poll_s)
    watch.start()
    try:
        yield
    finally:
        await watch.close()


def _digest(path: Path) -> bytes | None:
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError:
        return None
