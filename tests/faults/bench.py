"""A conversation under test: devices that follow it, messages that are sent to it, and the verdict at the end."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tests.faults.cluster import Account, Cluster, Member
from tests.faults.recorder import Device
from tests.faults.verdict import Verdict, judge, settled, table_of

_numbers = itertools.count(1)


async def until(holds: Callable[[], Awaitable[object]], *, timeout_s: float = 15, what: str = "it") -> None:
    """Return once something holds."""
    deadline = time.monotonic() + timeout_s
    while not await holds():
        assert time.monotonic() < deadline, f"{what} did not happen in {timeout_s:.0f} s"
        await asyncio.sleep(0.01)


def _has_come_to(device: Device, epoch: str, head: int) -> bool:
    return (device.epoch, device.last) == (epoch, head)


@dataclass(eq=False)
class Talk:
    """One conversation."""

    cluster: Cluster
    account: Account
    id: str
    stack: AsyncExitStack
    seed: int = 0
    devices: list[Device] = field(default_factory=list)
    replies: list[str] = field(default_factory=list)

    @property
    def channel(self) -> str:
        return f"conversation:{self.id}"

    async def device(self, *at: Member, urls: Callable[[], Sequence[str]] | None = None, **options: Any) -> Device:
        """Follow the conversation with one device more: at these processes, or at any."""
        if urls is None:
            urls = (lambda: [member.ws_url for member in at if member.port]) if at else self.cluster.sockets
        made = Device(
            urls, self.account.token, self.channel, name=f"device-{next(_numbers)}", seed=self.seed, **options
        )
        self.devices.append(made)
        return await self.stack.enter_async_context(made)

    async def send(self, device: Device, text: str, **fields: Any) -> str:
        """Send a message; return the id of its reply."""
        answer = await device.send(text, **fields)
        if answer["reply"] not in self.replies:
            self.replies.append(answer["reply"])
        return str(answer["reply"])

    async def settle(self, *, timeout_s: float = 20) -> None:
        """Wait until no reply is open and every device has seen the whole log."""
        began = time.monotonic()
        while problems := await settled(self.cluster.admin, self.account.workspace_id, [self.channel]):
            assert time.monotonic() - began < timeout_s, problems
            await asyncio.sleep(0.02)
        _, head, epoch = await table_of(self.cluster.admin, self.account.workspace_id, self.channel)
        for device in self.devices:
            if device.unsubbed is None:
                await device.until(partial(_has_come_to, device, epoch, head), timeout_s=timeout_s)

    async def head(self) -> int:
        """Return the number of the last event."""
        return (await table_of(self.cluster.admin, self.account.workspace_id, self.channel))[1]

    async def verdict(self, *, settle: bool = True, timeout_s: float = 20, **options: Any) -> Verdict:
        """Judge the conversation."""
        if settle:
            await self.settle(timeout_s=timeout_s)
        table, head, epoch = await table_of(self.cluster.admin, self.account.workspace_id, self.channel)
        found = judge(self.devices, table, head=head, epoch=epoch, **options)
        found.add("left_open", await settled(self.cluster.admin, self.account.workspace_id, [self.channel]))
        return found


@asynccontextmanager
async def talk(cluster: Cluster, account: Account, *, seed: int = 0) -> AsyncIterator[Talk]:
    """Make a conversation; its devices are gone at the end."""
    async with AsyncExitStack() as stack:
        yield Talk(cluster, account, await cluster.conversation(account), stack, seed)
