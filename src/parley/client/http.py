"""The HTTP side of the client: sign-in, tokens that renew themselves, conversations."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, urlsplit, urlunsplit
from uuid import UUID, uuid4

import httpx

from parley.client.errors import ApiError, ServerUnreachable

API = "/api/v1"
_MARGIN_S = 30.0


@dataclass(frozen=True, slots=True)
class Tokens:
    """A session. `expires_at` is the access token's, in seconds since 1970."""

    access_token: str
    refresh_token: str | None
    expires_at: float
    user: dict[str, Any] = field(default_factory=dict)
    workspace: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return asdict(self)


class ParleyHTTP:
    """A client of `/api/v1` for one user. `on_tokens` is called whenever the tokens change, None after they died."""

    def __init__(
        self,
        base_url: str,
        *,
        tokens: Tokens | None = None,
        on_tokens: Callable[[Tokens | None], None] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        timeout_s: float = 30,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self.tokens = tokens
        self._on_tokens = on_tokens
        self._clock = clock
        self._refreshing = asyncio.Lock()
        self._http = httpx.AsyncClient(base_url=self.base_url, transport=transport, timeout=timeout_s)

    async def __aenter__(self) -> Self:
        """Use as a context: closed at its end."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    @property
    def realtime_url(self) -> str:
        """The address of the socket."""
        parts = urlsplit(self.base_url)
        scheme = "wss" if parts.scheme == "https" else "ws"
        return urlunsplit((scheme, parts.netloc, f"{parts.path}{API}/realtime", "", ""))

    # -- session -------------------------------------------------------------------------------------------------

    async def sign_up(self, email: str, password: str, *, name: str | None = None) -> Tokens:
        """Make an account with a personal workspace and sign in to it."""
        body = {"email": email, "password": password, "confirmPassword": password}
        return self._signed_in(await self._send("POST", "/auth/signup", json=body | ({"name": name} if name else {})))

    async def sign_in(self, email: str, password: str) -> Tokens:
        """Sign in."""
        return self._signed_in(await self._send("POST", "/auth/signin", json={"email": email, "password": password}))

    async def refresh(self, *, used: str | None = None) -> Tokens:
        """Renew the tokens; callers at the same moment share one renewal.

        `used` is the access token that was refused: nothing is done if it has been replaced meanwhile.
        """
        async with self._refreshing:
            tokens = self.tokens
            if tokens is not None and used is not None and tokens.access_token != used:
                return tokens
            if tokens is None or tokens.refresh_token is None:
                raise ApiError(401, "unauthenticated", "Not signed in.")
            try:
                answer = await self._send("POST", "/auth/refresh", json={"refresh_token": tokens.refresh_token})
            except ApiError as error:
                if error.status == 401:
                    self._keep(None)
                raise
            return self._signed_in(answer)

    async def sign_out(self) -> None:
        """End the session on the server and here."""
        await self._authorised("POST", "/auth/signout")
        self._keep(None)

    async def access_token(self) -> str:
        """Return an access token that is good for a while yet."""
        tokens = self.tokens
        if tokens is None:
            raise ApiError(401, "unauthenticated", "Not signed in.")
        if tokens.expires_at - self._clock() < _MARGIN_S and tokens.refresh_token is not None:
            tokens = await self.refresh(used=tokens.access_token)
        return tokens.access_token

    async def realtime_ticket(self) -> str:
        """Return a ticket for one `hello`."""
        ticket: str = (await self._authorised("POST", "/realtime/tickets"))["data"]["ticket"]
        return ticket

    async def credentials(self) -> dict[str, str]:
        """Return what `RealtimeClient` puts into `hello`."""
        return {"ticket": await self.realtime_ticket()}

    # -- conversations -------------------------------------------------------------------------------------------

    async def create_conversation(
        self, *, title: str | None = None, model: str | None = None, assistant: str | None = None
    ) -> dict[str, Any]:
        """Make a conversation; `assistant` is the name of who answers in it, or its id."""
        wanted = {"title": title, "model": model, "assistant": assistant}
        body = {key: value for key, value in wanted.items() if value is not None}
        return _object(await self._authorised("POST", "/conversations", json=body))

    async def list_conversations(self, *, page: int = 1, per_page: int = 20) -> list[dict[str, Any]]:
        """Return a page of the conversations, latest first."""
        return _list(await self._authorised("GET", "/conversations", params={"page": page, "per_page": per_page}))

    async def get_conversation(self, id: str) -> dict[str, Any]:
        """Return a conversation."""
        return _object(await self._authorised("GET", f"/conversations/{quote(id, safe='')}"))

    async def list_messages(
        self, conversation: str, *, limit: int = 50, cursor: str | None = None
    ) -> tuple[list[dict[str, Any]], str | None]:
        """Return messages, ascending, and the cursor of the older ones before them (None: there are none)."""
        params: dict[str, str | int] = {"limit": limit} | ({"cursor": cursor} if cursor else {})
        path = f"/conversations/{quote(conversation, safe='')}/messages"
        answer = await self._authorised("GET", path, params=params)
        return _list(answer), answer["meta"].get("next_cursor")

    async def send_message(
        self, conversation: str, text: str, *, model: str | None = None, cid: UUID | str | None = None
    ) -> dict[str, Any]:
        """Send a message; returns `{message, reply}`, both whole. The same `cid` has one effect for ever."""
        return _object(
            await self._authorised(
                "POST",
                f"/conversations/{quote(conversation, safe='')}/messages",
                json={"text": text} | ({"model": model} if model else {}),
                headers={"Idempotency-Key": str(cid or uuid4())},
            )
        )

    async def cancel(self, reply: str) -> dict[str, Any] | None:
        """Stop a reply, durably; stopping it twice is one stop."""
        answer = await self._authorised("POST", f"/replies/{quote(reply, safe='')}/cancel")
        data: dict[str, Any] | None = answer.get("data")
        return data

    async def approve(self, call: str, *, approved: bool) -> dict[str, Any]:
        """Say yes or no to a tool call that waits; returns `{call, reply, approved}`. The first answer holds."""
        path = f"/tool-calls/{quote(call, safe='')}/approve"
        return _object(await self._authorised("POST", path, json={"approved": approved}))

    async def list_assistants(self) -> list[dict[str, Any]]:
        """Return the built-in assistants and the workspace's own."""
        return _list(await self._authorised("GET", "/assistants"))

    async def continue_reply(self, reply: str, *, cid: UUID | str | None = None) -> dict[str, Any]:
        """Go on from where a reply stopped, in a reply of its own; returns `{message, reply}`, both whole.

        The same `cid` has one effect for ever.
        """
        return await self._again(reply, "continue", cid)

    async def regenerate_reply(self, reply: str, *, cid: UUID | str | None = None) -> dict[str, Any]:
        """Answer the same question once more; returns `{message, reply}`, both whole. One `cid`, one effect."""
        return await self._again(reply, "regenerate", cid)

    async def _again(self, reply: str, how: str, cid: UUID | str | None) -> dict[str, Any]:
        path, key = f"/replies/{quote(reply, safe='')}/{how}", str(cid or uuid4())
        return _object(await self._authorised("POST", path, headers={"Idempotency-Key": key}))

    async def list_models(self) -> list[dict[str, Any]]:
        """Return the models, usable or not."""
        return _list(await self._authorised("GET", "/models"))

    # -- requests ------------------------------------------------------------------------------------------------

    async def _authorised(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        token = await self.access_token()
        headers = options.pop("headers", {})
        try:
            return await self._send(method, path, headers=headers | _bearer(token), **options)
        except ApiError as error:
            if error.status != 401 or self.tokens is None or self.tokens.refresh_token is None:
                raise
        tokens = await self.refresh(used=token)
        return await self._send(method, path, headers=headers | _bearer(tokens.access_token), **options)

    async def _send(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        try:
            response = await self._http.request(method, API + path, **options)
        except httpx.TransportError as error:
            raise ServerUnreachable(f"{self.base_url} does not answer: {str(error) or type(error).__name__}") from error
        body: Any = None
        if response.content:
            try:
                body = response.json()
            except ValueError:
                body = None
        if response.is_success and (isinstance(body, dict) or not response.content):
            return body or {}
        if isinstance(body, dict) and "error" in body:
            details = dict(body.get("details") or {})
            if (after := response.headers.get("Retry-After", "")).isdigit():
                details["retry_after_s"] = int(after)
            raise ApiError(response.status_code, body["error"], body.get("message", ""), details)
        raise ApiError(response.status_code, "bad_response", f"{self.base_url} does not answer like a Parley server.")

    def _signed_in(self, answer: dict[str, Any]) -> Tokens:
        data = answer.get("data") or {}
        if "access_token" not in data:
            raise ApiError(202, "verification_required", "Confirm the e-mail address first: a message is on its way.")
        tokens = Tokens(
            access_token=data["access_token"],
            refresh_token=data.get("refresh_token"),
            expires_at=self._clock() + data["expires_in"],
            user=data.get("user") or {},
            workspace=data.get("workspace") or {},
        )
        self._keep(tokens)
        return tokens

    def _keep(self, tokens: Tokens | None) -> None:
        self.tokens = tokens
        if self._on_tokens is not None:
            self._on_tokens(tokens)


def _bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def _object(answer: dict[str, Any]) -> dict[str, Any]:
    data: dict[str, Any] = answer["data"]
    return data


def _list(answer: dict[str, Any]) -> list[dict[str, Any]]:
    data: list[dict[str, Any]] = answer["data"]
    return data
