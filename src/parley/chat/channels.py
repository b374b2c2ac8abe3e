"""The chat's live channels: a conversation, and a user's inbox."""

from collections.abc import Mapping
from uuid import UUID

from pydantic import BaseModel

from parley.chat.events import CONVERSATION_EVENTS, INBOX_EVENTS, ConversationState, InboxState
from parley.chat.messages import conversation_channel, conversation_of
from parley.chat.repository import ConversationRepository
from parley.chat.service import ConversationService
from parley.core.db import UnitOfWork
from parley.core.scope import Scope
from parley.jobs.registry import JobRegistry
from parley.jobs.repository import JobRepository
from parley.jobs.service import JobService
from parley.realtime.bus import Bus
from parley.realtime.channels import ChannelNotFound, Mode, State
from parley.realtime.events import Channel, user_channel
from parley.tenancy.permissions import Permission


class ConversationChannel:
    """`conversation:{id}`: messages and replies of a conversation."""

    prefix = "conversation"
    mode: Mode = "log"
    permission: str = Permission.CHAT_READ
    pattern = "conversation:{id}"
    events: Mapping[str, type[BaseModel]] = CONVERSATION_EVENTS
    snapshot: type[BaseModel] = ConversationState

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def resolve(self, unit: UnitOfWork, scope: Scope, argument: str) -> Channel:
        """Return the channel if the conversation is the caller's to see."""
        id_ = _id(f"{self.prefix}:{argument}")
        if await ConversationRepository(unit, scope).find(id_) is None:
            raise ChannelNotFound
        return conversation_channel(scope.workspace_id, id_)

    async def state(self, unit: UnitOfWork, scope: Scope, channel: Channel) -> State:
        """Return the conversation and its newest 50 messages, running replies with their parts so far."""
        return await ConversationService(unit, scope, self._bus).snapshot(_id(channel.name))


class UserChannel:
    """`user:me`: the caller's inbox."""

    prefix = "user"
    mode: Mode = "log"
    permission: str = Permission.CHAT_READ
    pattern = "user:me"
    events: Mapping[str, type[BaseModel]] = INBOX_EVENTS
    snapshot: type[BaseModel] = InboxState

    def __init__(self, bus: Bus, jobs: JobRegistry) -> None:
        self._bus = bus
        self._jobs = jobs

    async def resolve(self, unit: UnitOfWork, scope: Scope, argument: str) -> Channel:  # noqa: ARG002 - the port's
        """Return the caller's own channel; there is no other user's."""
        if argument != "me":
            raise ChannelNotFound
        return user_channel(scope.workspace_id, scope.user_id)

    async def state(self, unit: UnitOfWork, scope: Scope, channel: Channel) -> State:  # noqa: ARG002 - the port's
        """Return the newest conversations and the unfinished jobs."""
        state = await ConversationService(unit, scope, self._bus).inbox()
        jobs = await JobService(JobRepository(unit, scope, self._jobs)).unfinished()
        return {**state, "jobs": [job.model_dump(mode="json") for job in jobs]}


def _id(name: str) -> UUID:
    found = conversation_of(name)
    if found is None:
        raise ChannelNotFound
    return found
