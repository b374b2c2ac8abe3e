"""Rules of docs and conventions that can be read off the source: one function per rule, each returning violations."""

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

MAX_LINES = 450


@dataclass(frozen=True)
class Source:
    """A Python file; `path` is below `src/parley`."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    def at(self, node: ast.AST, what: str) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 0)} {what}"


Rule = Callable[[Sequence[Source]], list[str]]


def sources_below(root: Path) -> list[Source]:
    """Return every Python file below a folder."""
    return [Source(path.relative_to(root).as_posix(), path.read_text()) for path in sorted(root.rglob("*.py"))]


def dotted(node: ast.AST) -> str:
    """Return `a.b.c` of an expression, `?` for what is not a name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def imports(source: Source) -> Iterator[tuple[ast.AST, str]]:
    """Yield each imported module, and each `module.name`."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node, node.module or "."
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


def _calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


# -- scope ---------------------------------------------------------------------------------------------------------

# Who works before there is a scope, or for all workspaces at once.
UNSCOPED_USERS = {
    "cli/operating.py",
    "cli/usage.py",
    "identity/api_keys.py",
    "identity/authenticator.py",
    "identity/clerk_webhooks.py",
    "identity/external_users.py",
    "identity/invitations.py",
    "identity/issuer_tokens.py",
    "identity/mails.py",
    "identity/operators.py",
    "identity/password_service.py",
    "identity/service.py",
    "identity/sessions.py",
    "jobs/inprocess.py",
    "llm/provider_keys.py",
    "tenancy/making.py",
    "tenancy/operators.py",
    "tenancy/service.py",
    "tenancy/workspaces.py",
    "usage/background.py",
    "usage/operators.py",
}
SYSTEM_ROLE_USERS = {
    "chat/attachments/background.py",
    "chat/background.py",
    "chat/take_over.py",
    "core/db.py",
    "core/idempotency.py",
    "core/listening.py",
    "identity/api_keys.py",
    "identity/authenticator.py",
    "identity/background.py",
    "identity/clerk_webhooks.py",
    "identity/erasures.py",
    "identity/exports.py",
    "identity/external_users.py",
    "identity/invitations.py",
    "identity/mails.py",
    "identity/operators.py",
    "identity/password_service.py",
    "identity/personal_data.py",
    "identity/service.py",
    "identity/sessions.py",
    "jobs/background.py",
    "jobs/inprocess.py",
    "jobs/personal_data.py",
    "jobs/schedule.py",
    "llm/provider_keys.py",
    "realtime/bus.py",
    "realtime/epochs.py",
    "realtime/personal_data.py",
    "realtime/retention.py",
    "realtime/tick.py",
    "realtime/tickets.py",
    "realtime/wire.py",
    "tenancy/operators.py",
    "tenancy/personal_data.py",
    "tenancy/workspaces.py",
    "usage/background.py",
    "usage/operators.py",
    "usage/personal_data.py",
    "usage/sweeping.py",
}
# A connection straight from an engine is bound to no workspace.
ENGINE_USERS = {"core/db.py", "core/migrate.py"}


def unscoped_classes_stay_with_their_users(sources: Sequence[Source]) -> list[str]:
    """Find uses of a class named `Unscoped…` outside the allow list."""
    found = []
    for source in sources:
        made_here = {node.name for node in ast.walk(source.tree) if isinstance(node, ast.ClassDef)}
        for node in ast.walk(source.tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            names += [node.attr] if isinstance(node, ast.Attribute) else []
            strangers = (name for name in names if name.startswith("Unscoped") and name not in made_here)
            found += [source.at(node, name) for name in strangers if source.path not in UNSCOPED_USERS]
    return found


def the_system_role_stays_with_its_users(sources: Sequence[Source]) -> list[str]:
    """Find transactions and connections of the system role outside the allow list."""
    names = {"system_unit_of_work", "connect_system", "SystemSession"}
    return [
        source.at(node, node.attr)
        for source in sources
        if source.path not in SYSTEM_ROLE_USERS
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Attribute) and node.attr in names
    ]


def engines_are_used_through_units_of_work(sources: Sequence[Source]) -> list[str]:
    """Find `database.app.connect()` and its like: no workspace is bound on those."""
    opened = re.compile(r"(^|\.)(app|system|engine)\.(connect|begin|raw_connection)$")
    return [
        source.at(call, dotted(call.func))
        for source in sources
        if source.path not in ENGINE_USERS
        for call in _calls(source.tree)
        if opened.search(dotted(call.func))
    ]


# -- transactions --------------------------------------------------------------------------------------------------

# Turns opens its units of work itself, and takes back what it wrote when another process holds the reply by now.
OWN_ROLLBACKS = {"chat/ends.py", "chat/turns.py"}


def only_the_unit_of_work_ends_transactions(sources: Sequence[Source]) -> list[str]:
    """Find `commit()` and `rollback()` outside the unit of work."""
    found = []
    for source in sources:
        if source.path == "core/unit_of_work.py":
            continue
        for call in _calls(source.tree):
            end = call.func.attr if isinstance(call.func, ast.Attribute) else ""
            if end == "commit" or (end == "rollback" and source.path not in OWN_ROLLBACKS):
                found.append(source.at(call, dotted(call.func)))
    return found


def _yields(function: ast.AST) -> bool:
    inner = [node for node in ast.walk(function) if isinstance(node, ast.Yield | ast.YieldFrom)]
    return isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and bool(inner)


def yielding_dependencies_end_before_the_answer(sources: Sequence[Source]) -> list[str]:
    """Find `Depends(something that yields)` without `scope="function"`: its commit would come after the answer."""
    yielding = {
        node.name
        for source in sources
        for node in ast.walk(source.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _yields(node)
    }
    found = []
    for source in sources:
        for call in _calls(source.tree):
            if dotted(call.func).rpartition(".")[2] not in {"Depends", "Security"} or not call.args:
                continue
            name = dotted(call.args[0]).rpartition(".")[2]
            scope = next((word.value for word in call.keywords if word.arg == "scope"), None)
            if name in yielding and not (isinstance(scope, ast.Constant) and scope.value == "function"):
                found.append(source.at(call, f"Depends({name})"))
    return found


# -- modules -------------------------------------------------------------------------------------------------------

_NOWHERE_NAMES = {"utils.py", "util.py", "helpers.py", "constants.py", "common.py", "tasks.py"}
# What connects, reads or starts something; nothing of it happens at import.
_EFFECTS = re.compile(
    r"(^|\.)(create_engine|create_async_engine|create_app|load_settings|create_http_client|FastAPI|Settings|Database"
    r"|EmbeddedPostgres|AsyncClient|Client|connect|create_pool|open|read_text|read_bytes|write_text|mkdir|getenv"
    r"|basicConfig|Thread|Popen|run|create_task|system|print|urlopen|sleep)$"
)


def modules_are_named_after_what_they_are(sources: Sequence[Source]) -> list[str]:
    """Find files whose name says nothing, or the wrong thing."""
    return [source.path for source in sources if source.name in _NOWHERE_NAMES]


def files_are_short(sources: Sequence[Source]) -> list[str]:
    """Find files of more lines than anyone reads."""
    lengths = {source.path: len(source.text.splitlines()) for source in sources}
    return [f"{path}: {lines} lines" for path, lines in lengths.items() if lines > MAX_LINES]


def models_are_read_at_run_time(sources: Sequence[Source]) -> list[str]:
    """Find `from __future__ import annotations` in `models.py`: SQLModel's relationships break on it."""
    return [
        source.path
        for source in sources
        if source.name == "models.py" and any(name == "__future__.annotations" for _, name in imports(source))
    ]


class _AtImport(ast.NodeVisitor):
    """Collects the calls that run when a module is imported: not those inside functions."""

    def __init__(self) -> None:
        self.calls: list[ast.Call] = []
        self.reads: list[ast.AST] = []

    def _visit_function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for part in (*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)):
            self.visit(part)

    visit_FunctionDef = visit_AsyncFunctionDef = _visit_function  # noqa: N815 - ast's names

    def visit_Lambda(self, node: ast.Lambda) -> None:
        pass

    def visit_Call(self, node: ast.Call) -> None:
        self.calls.append(node)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if dotted(node) == "os.environ":
            self.reads.append(node)
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        if not (isinstance(node.test, ast.Compare) and dotted(node.test.left) == "__name__"):
            self.generic_visit(node)


def nothing_happens_at_import(sources: Sequence[Source]) -> list[str]:
    """Find modules that connect, read or start something when they are imported."""
    found = []
    for source in sources:
        if source.name == "__main__.py":
            continue
        visitor = _AtImport()
        visitor.visit(source.tree)
        found += [source.at(call, dotted(call.func)) for call in visitor.calls if _EFFECTS.search(dotted(call.func))]
        found += [source.at(node, "os.environ") for node in visitor.reads]
    return found


# The embedded server's processes are given the little of ours that they need.
ENVIRONMENT_READERS = {"core/settings.py", "core/embedded_postgres/isolation.py"}


def the_environment_is_read_by_settings_only(sources: Sequence[Source]) -> list[str]:
    """Find reads of single variables outside the allow list; handing the whole on to a child is none."""
    return [
        source.at(node, "os.environ")
        for source in sources
        if source.path not in ENVIRONMENT_READERS
        for node in ast.walk(source.tree)
        if (isinstance(node, ast.Attribute) and dotted(node) in {"os.environ.get", "os.getenv"})
        or (isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and dotted(node.value) == "os.environ")
    ]


# -- libraries -----------------------------------------------------------------------------------------------------

# One place for each: what it is configured with there holds everywhere.
_ONE_PLACE = {
    "jose": {"identity/tokens.py"},
    "jwt": {"identity/issuer_tokens.py", "identity/jwks.py"},
    "passlib": {"identity/passwords.py"},
    "aiohttp": {"core/http.py"},
}


def some_libraries_have_one_place(sources: Sequence[Source]) -> list[str]:
    """Find imports of python-jose and its like in a second file."""
    return sorted(
        {
            source.at(node, name.partition(".")[0])
            for source in sources
            for node, name in imports(source)
            if source.path not in _ONE_PLACE.get(name.partition(".")[0], {source.path})
        }
    )


def http_clients_are_made_in_one_place(sources: Sequence[Source]) -> list[str]:
    """Find HTTP clients made outside `core/http.py`, our own client and the checks from outside."""
    return [
        source.at(call, dotted(call.func))
        for source in sources
        if source.path != "core/http.py" and not source.path.startswith(("client/", "conformance/"))
        for call in _calls(source.tree)
        if re.search(r"(^|\.)(AsyncClient|ClientSession)$|^httpx\.Client$", dotted(call.func))
    ]


# What can reach another machine, and who may: URLs that users set go through the guarded client of `core/http.py`,
# which is handed to whoever asks by it. Our own client, the checks from outside and the operator's commands stand
# outside of the service.
_OUTSIDE = ("client/", "conformance/")
_REACHES_OUT: dict[str, set[str]] = {
    "aiohttp": {"core/http.py"},
    "aiosmtplib": {"cli/doctor.py", "core/mail.py"},
    "httpx": {
        "chat/attachments/setup.py",
        "cli/doctor.py",
        "core/buckets.py",
        "core/http.py",
        "dialect/images.py",
        "identity/issuer_tokens.py",
        "identity/jwks.py",
        "identity/setup.py",
        "llm/adapters/*",
        "llm/factory.py",
        "usage/service.py",
    },
    "httpx_aiohttp": {"core/http.py"},
    "redis": {"cli/doctor.py", "core/rate_limits.py", "realtime/wire.py"},
    "socket": {"cli/serve.py", "core/http.py"},
    "websockets": {"realtime/protocol.py"},
    "yarl": {"core/http.py"},
} | {
    library: set()
    for library in (
        "aiodns", "aiohappyeyeballs", "aioquic", "anthropic", "boto3", "botocore", "dns", "ftplib", "grpc", "h11", "h2",
        "http.client", "httpcore", "httplib2", "httptools", "imaplib", "niquests", "openai", "paramiko", "poplib",
        "pycurl", "requests", "smtplib", "socketserver", "telnetlib", "tornado", "trio", "urllib.request", "urllib3",
        "wsproto", "xmlrpc",
    )
}  # fmt: skip
_DIALS = re.compile(
    r"(^|\.)(open_connection|open_unix_connection|create_connection|create_unix_connection|create_datagram_endpoint"
    r"|sock_connect|urlopen|urlretrieve|HTTPTransport|AsyncHTTPTransport|AiohttpTransport|TCPConnector|__import__"
    r"|import_module)$|^httpx\.(get|post|put|patch|delete|head|options|request|stream)$"
)
_MAKES_CLIENT = re.compile(r"\.create_(http|guarded)_client$")
DIALLERS = {"core/http.py"}
CLIENT_MAKERS = {"cli/doctor.py", "core/http.py", "main.py"}


def _may(path: str, allowed: set[str]) -> bool:
    return path.startswith(_OUTSIDE) or path in allowed or f"{path.rpartition('/')[0]}/*" in allowed


def nothing_else_reaches_out(sources: Sequence[Source]) -> list[str]:
    """Find libraries that can reach another machine, and connections made by hand, outside of their places."""
    found = []
    for source in sources:
        for node, name in imports(source):
            library = next((one for one in _REACHES_OUT if name == one or name.startswith(f"{one}.")), None)
            if library is not None and not _may(source.path, _REACHES_OUT[library]):
                found.append(source.at(node, library))
            if _MAKES_CLIENT.search(name) and not _may(source.path, CLIENT_MAKERS):
                found.append(source.at(node, name.rpartition(".")[2]))
        for call in _calls(source.tree):
            name = dotted(call.func)
            if _DIALS.search(name) and not _may(source.path, DIALLERS):
                found.append(source.at(call, name))
            if _MAKES_CLIENT.search(name) and not _may(source.path, CLIENT_MAKERS):
                found.append(source.at(call, name))
    return sorted(set(found))


# -- comments ------------------------------------------------------------------------------------------------------

_IGNORE = re.compile(r"#\s*type:\s*ignore")
_IGNORE_WITH_REASON = re.compile(r"#\s*type:\s*ignore\[[a-z0-9-]+(, ?[a-z0-9-]+)*\]\s+#\s*\w.*")


def ignores_carry_a_code_and_a_reason(sources: Sequence[Source]) -> list[str]:
    """Find `type: ignore` without an error code or without why."""
    found = []
    for source in sources:
        for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
            comment = token.string
            if token.type == tokenize.COMMENT and _IGNORE.search(comment) and not _IGNORE_WITH_REASON.search(comment):
                found.append(f"{source.path}:{token.start[0]} {comment}")
    return found


RULES: tuple[Rule, ...] = (
    unscoped_classes_stay_with_their_users,
    the_system_role_stays_with_its_users,
    engines_are_used_through_units_of_work,
    only_the_unit_of_work_ends_transactions,
    yielding_dependencies_end_before_the_answer,
    modules_are_named_after_what_they_are,
    files_are_short,
    models_are_read_at_run_time,
    nothing_happens_at_import,
    the_environment_is_read_by_settings_only,
    some_libraries_have_one_place,
    http_clients_are_made_in_one_place,
    nothing_else_reaches_out,
    ignores_carry_a_code_and_a_reason,
)
