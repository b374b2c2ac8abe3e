"""The Python client of Parley: HTTP, and the live protocol `parley.v1` with its client rule."""

from parley.client.connection import RealtimeClient
from parley.client.errors import ApiError, ClientError, ConnectionStopped, ReplyGone, ServerUnreachable
from parley.client.events import SNAPSHOT, ConnectionChange, EventStream
from parley.client.http import ParleyHTTP, Tokens
from parley.client.link import Timing

__all__ = [
    "SNAPSHOT",
    "ApiError",
    "ClientError",
    "ConnectionChange",
    "ConnectionStopped",
    "EventStream",
    "ParleyHTTP",
    "RealtimeClient",
    "ReplyGone",
    "ServerUnreachable",
    "Timing",
    "Tokens",
]
