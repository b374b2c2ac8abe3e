"""`parley chat`: a conversation in the terminal, over the live protocol."""

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TextIO
from uuid import uuid4

import typer

from parley.cli.approving import Asking
from parley.client import ApiError, ClientError, ConnectionChange, ConnectionStopped, ParleyHTTP, RealtimeClient
from parley.client.session_file import SessionFile, session_path
from parley.client.states import FINISHED, find_message
from parley.client.terminal import LineReader, Screen
from parley.client.view import ReplyView

_LATEST = 10
_SHOWN_MESSAGES = 6
_HELP = """\
/new          begin a new conversation
/list         show the latest conversations
/open NUMBER  go on with one of them
/model NAME   answer with this model; without a name, the models there are
/continue     go on with the last reply, where it stopped
/retry        have the last question answered once more
/help         this
/quit         leave (so does Ctrl-D; Ctrl-C stops a reply, at the prompt it leaves)"""


class SignInNeeded(Exception):
    """There is no session, and no e-mail address and password to begin one."""


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What the command was called with."""

    server: str = "http://localhost:3000"
    email: str | None = None
    password: str | None = None
    sign_up: bool = False
    conversation: str | None = None
    new: bool = False
    model: str | None = None
    assistant: str | None = None
    messages: list[str] = field(default_factory=list)
    session: Path | None = None


class Chat:
    """One run of the command."""

    def __init__(self, http: ParleyHTTP, options: ChatOptions, lines: LineReader, screen: Screen) -> None:
        self._http = http
        self._options = options
        self._lines = lines
        self._screen = screen
        self._model = options.model
        self._interactive = screen.is_terminal and not options.messages
        self._listed: list[dict[str, Any]] = []
        self._conversation = ""
        self._reply: str | None = None
        self._view: ReplyView | None = None
        self._asking: Asking | None = None
        self._busy = False
        self._stopping = False
        self._lost = False
        self._interrupted = False
        self._cancelling: set[asyncio.Task[None]] = set()
        self._main: asyncio.Task[Any] | None = None
        self._client = RealtimeClient(
            http.realtime_url, http.credentials, on_event=self._event, on_snapshot=self._moved,
            on_connection=self._connection, name="parley-cli",
        )  # fmt: skip

    async def run(self) -> int:
        """Talk until the end of the input. Returns the exit code."""
        self._main = asyncio.current_task()
        loop = asyncio.get_running_loop()
        with suppress(NotImplementedError, RuntimeError, ValueError):
            loop.add_signal_handler(signal.SIGINT, self.interrupt)
        try:
            async with self._client:
                return await self._talk()
        except asyncio.CancelledError:
            if not self._interrupted:
                raise
            self._screen.end_line()
            return 0 if self._interactive else 130
        finally:
            for task in self._cancelling:
                task.cancel()
            with suppress(NotImplementedError, RuntimeError, ValueError):
                loop.remove_signal_handler(signal.SIGINT)

    def interrupt(self) -> None:
        """Ctrl-C: stop the reply that is being written, durably; a second time, or at the prompt, leave."""
        if self._busy and not self._stopping:
            self._stopping = True
            self._cancel_reply()
        elif self._main is not None:
            self._interrupted = True
            self._main.cancel()

    def _cancel_reply(self) -> None:
        if self._reply is not None:
            task = asyncio.create_task(self._client.cancel(self._reply))
            self._cancelling.add(task)
            task.add_done_callback(self._cancelling.discard)

    # -- the conversation ----------------------------------------------------------------------------------------

    async def _talk(self) -> int:
        await self._begin()
        if self._options.messages:
            ended_well = [await self._say(text) for text in self._options.messages]
            return (0 if all(ended_well) else 1) if not self._stopping else 130
        while True:
            if self._interactive:
                self._screen.prompt("> ")
            line = await self._lines.line()
            if line is None:
                self._screen.end_line()
                return 0
            if line.strip().startswith("/"):
                if not await self._command(line.strip()):
                    return 0
            elif line.strip():
                await self._say(line)

    async def _begin(self) -> None:
        options = self._options
        if options.conversation is not None:
            await self._open(await self._http.get_conversation(options.conversation))
            return
        if self._interactive and not options.new:
            await self._list()
            if self._listed:
                self._screen.prompt("Number of the one to go on with, Enter for a new one: ")
                chosen = self._at((await self._lines.line()) or "")
                if chosen is not None:
                    await self._open(chosen)
                    return
        await self._new()

    async def _new(self) -> None:
        made = await self._http.create_conversation(model=self._model, assistant=self._options.assistant)
        await self._open(made)

    async def _open(self, conversation: dict[str, Any]) -> None:
        if self._conversation:
            await self._client.unsubscribe(self._channel)
        self._conversation = conversation["id"]
        state = await self._client.subscribe(self._channel)
        messages = state.get("messages", [])
        if self._interactive:
            self._screen.line(f"{conversation['title'] or 'New conversation'} ({conversation['id']})", dim=True)
            for message in messages[-_SHOWN_MESSAGES:]:
                if message["status"] in FINISHED:
                    self._history(message)
        if messages and messages[-1]["status"] not in FINISHED:
            await self._follow(messages[-1]["id"])

    def _history(self, message: dict[str, Any]) -> None:
        if message["role"] == "user":
            text = "".join(part.get("text", "") for part in message["parts"])
            self._screen.line(f"> {text}", dim=True)
        else:
            ReplyView(self._screen).show(message)
            self._screen.end_line()

    @property
    def _channel(self) -> str:
        return f"conversation:{self._conversation}"

    async def _say(self, text: str) -> bool:
        """Send a message and show its reply. Returns whether the reply was completed."""
        self._busy, self._stopping = True, False
        cid = uuid4()
        try:
            try:
                sent = await self._client.send(self._channel, text, model=self._model, cid=cid)
            except ApiError as error:
                if error.code != "too_large":
                    raise
                # A frame has 64 KiB; HTTP takes the longest message there may be. Same key: it is sent once.
                turn = await self._http.send_message(self._conversation, text, model=self._model, cid=cid)
                sent = {"reply": turn["reply"]["id"]}
            return await self._follow(sent["reply"])
        except ApiError as error:
            self._screen.note(f"not sent: {error.message}")
            return False
        finally:
            self._busy = False

    async def _follow(self, reply: str) -> bool:
        self._busy, self._reply, self._view = True, reply, ReplyView(self._screen)
        if self._stopping:
            self._cancel_reply()
        self._asking = Asking(self._client, self._lines, self._screen, interactive=self._interactive)
        asking = asyncio.create_task(self._asking.run(reply))
        try:
            self._moved(self._channel)
            message = await self._client.wait_terminal(reply)
            self._view.show(message)
        finally:
            asking.cancel()
            with suppress(asyncio.CancelledError, ClientError):
                await asking
            self._busy, self._reply, self._view, self._asking = False, None, None, None
        self._screen.end_line()
        if message["status"] == "cancelled":
            self._screen.note("stopped")
        elif message["status"] == "failed":
            self._screen.note(f"failed: {(message['error'] or {}).get('msg') or 'the reply could not be written'}")
            if self._interactive:
                self._screen.note("/continue goes on from there, /retry has it answered once more")
        return bool(message["status"] == "completed")

    async def _again(self, ask: Callable[..., Awaitable[dict[str, Any]]]) -> None:
        """Have the last reply continued or made anew, and show what comes."""
        reply = self._last_reply()
        if reply is None:
            self._screen.note("there is no reply yet")
            return
        self._busy, self._stopping = True, False
        try:
            await self._follow((await ask(reply["id"], cid=uuid4()))["reply"])
        finally:
            self._busy = False

    def _last_reply(self) -> dict[str, Any] | None:
        """Return the newest reply of the branch that is shown."""
        state = self._client.state(self._channel)
        message = find_message(state, state.get("conversation", {}).get("current_id") or "")
        while message is not None and message["role"] != "assistant":
            message = find_message(state, message.get("parent_id") or "")
        return message

    def _event(self, ch: str, e: str, d: dict[str, Any]) -> None:
        if e == "reply.resumed" and self._view is not None and d["reply"] == self._reply:
            self._view.resumed(d)
        self._moved(ch)

    def _moved(self, ch: str, *_: object) -> None:
        if self._view is None or self._reply is None or ch != self._channel:
            return
        message = find_message(self._client.state(ch), self._reply)
        if message is not None:
            self._view.show(message)
            if self._asking is not None:
                self._asking.show(message)

    def _connection(self, change: ConnectionChange) -> None:
        if change.state == "disconnected":
            self._lost = True
            self._screen.note("… connection lost, reconnecting")
        elif change.state == "connected" and self._lost:
            self._lost = False
            position = (change.positions or {}).get(self._channel)
            self._screen.note("✓ reconnected" + ("" if position is None else f", resumed at {position}"))

    # -- commands ------------------------------------------------------------------------------------------------

    async def _command(self, line: str) -> bool:
        """Do what a line with a slash says. Returns whether to go on."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        try:
            match name:
                case "/quit" | "/exit":
                    return False
                case "/new":
                    await self._new()
                case "/list":
                    await self._list()
                case "/open":
                    await self._open_listed(argument)
                case "/model":
                    await self._choose_model(argument)
                case "/continue":
                    await self._again(self._client.continue_reply)
                case "/retry":
                    await self._again(self._client.regenerate_reply)
                case "/help":
                    self._screen.line(_HELP)
                case _:
                    self._screen.note(f"there is no {name}; /help lists what there is")
        except ApiError as error:
            self._screen.note(error.message)
        return True

    async def _list(self) -> None:
        self._listed = await self._http.list_conversations(per_page=_LATEST)
        for number, conversation in enumerate(self._listed, 1):
            here = "*" if conversation["id"] == self._conversation else " "
            self._screen.line(f"{number:>2}{here} {conversation['title'] or 'New conversation'}")

    async def _open_listed(self, argument: str) -> None:
        conversation = self._at(argument)
        if conversation is None:
            self._screen.note("/open takes a number of /list")
        else:
            await self._open(conversation)

    def _at(self, number: str) -> dict[str, Any] | None:
        number = number.strip()
        if number.isascii() and number.isdigit() and 1 <= int(number) <= len(self._listed):
            return self._listed[int(number) - 1]
        return None

    async def _choose_model(self, name: str) -> None:
        if name:
            self._model = name
            self._screen.note(f"answers come from {name} from now on")
            return
        for model in await self._http.list_models():
            self._screen.line(f"{model['id']}{'' if model['usable'] else '  (' + str(model['reason']) + ')'}")


async def chat(options: ChatOptions, *, stdin: int | None, out: TextIO, err: TextIO) -> int:
    """Sign in, talk, and return the exit code. Raises `SignInNeeded` and what the client raises."""
    file = SessionFile(options.session) if options.session is not None else None
    keep: Callable[[Any], None] | None = file.save if file is not None else None
    tokens = file.load() if file is not None else None
    async with ParleyHTTP(options.server, on_tokens=keep) as http:
        if tokens is not None and not options.sign_up and options.email in {None, tokens.user.get("email")}:
            http.tokens = tokens
            try:
                await http.list_conversations(per_page=1)
            except ApiError as error:
                if error.status != 401:
                    raise
                http.tokens = None
        if http.tokens is None:
            if not (options.email and options.password):
                raise SignInNeeded
            sign = http.sign_up if options.sign_up else http.sign_in
            await sign(options.email, options.password)
        return await Chat(http, options, LineReader(stdin), Screen(out, err)).run()


def chat_command(
    server: Annotated[str, typer.Option(help="Address of the server")] = "http://localhost:3000",
    email: Annotated[str | None, typer.Option(envvar="PARLEY_EMAIL", help="Sign in as")] = None,
    password: Annotated[str | None, typer.Option(envvar="PARLEY_PASSWORD", help="Asked for if it is not given")] = None,
    sign_up: Annotated[bool, typer.Option("--sign-up", help="Make the account first")] = False,
    conversation: Annotated[str | None, typer.Option(help="Go on with this conversation")] = None,
    new: Annotated[bool, typer.Option("--new", help="Begin a new conversation")] = False,
    model: Annotated[str | None, typer.Option(help="Answer with this model")] = None,
    assistant: Annotated[str | None, typer.Option(help="Who answers in new conversations: a name or an id")] = None,
    message: Annotated[list[str] | None, typer.Option("--message", "-m", help="Send this and leave")] = None,
    no_save: Annotated[bool, typer.Option("--no-save", help="Do not keep the session in ~/.config/parley")] = False,
) -> None:
    """Talk with a model in the terminal. Input that is piped in is sent line by line."""
    options = ChatOptions(
        server=server.rstrip("/"), email=email, password=password, sign_up=sign_up, conversation=conversation, new=new,
        model=model, assistant=assistant, messages=message or [],
        session=None if no_save else session_path(server, os.environ),
    )  # fmt: skip
    try:
        code = _run(options)
    except ConnectionStopped as stopped:
        code = _explain(f"the live connection ended: {stopped.reason or stopped.code}")
    except ApiError as error:
        hint = " Leave out --sign-up to sign in." if error.code == "email_taken" else ""
        code = _explain(error.message + hint)
    except ClientError as error:
        code = _explain(f"{error}. Is it running? `parley serve` starts one.")
    except BrokenPipeError:
        # Who read the output has gone: nothing more can be said, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    raise typer.Exit(code)


def _run(options: ChatOptions) -> int:
    stdin = sys.stdin.fileno() if sys.stdin is not None else None
    try:
        return asyncio.run(chat(options, stdin=stdin, out=sys.stdout, err=sys.stderr))
    except SignInNeeded:
        if stdin is None or not os.isatty(stdin):
            return _explain("not signed in: give --email, and the password in PARLEY_PASSWORD")
    # Asked for outside the loop, where Ctrl-C leaves at once.
    email = options.email or typer.prompt("E-mail")
    password = options.password or typer.prompt("Password", hide_input=True)
    asked = replace(options, email=email, password=password)
    return asyncio.run(chat(asked, stdin=stdin, out=sys.stdout, err=sys.stderr))


def _explain(problem: str) -> int:
    typer.secho(f"parley: {problem}", err=True, fg=typer.colors.RED)
    return 2
