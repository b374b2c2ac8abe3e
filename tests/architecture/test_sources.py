"""The source keeps the rules of the conventions that a program can read."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from parley.core.settings import Settings
from tests.architecture.source_rules import (
    MAX_LINES,
    RULES,
    Rule,
    Source,
    engines_are_used_through_units_of_work,
    files_are_short,
    http_clients_are_made_in_one_place,
    ignores_carry_a_code_and_a_reason,
    models_are_read_at_run_time,
    modules_are_named_after_what_they_are,
    nothing_else_reaches_out,
    nothing_happens_at_import,
    only_the_unit_of_work_ends_transactions,
    some_libraries_have_one_place,
    sources_below,
    the_environment_is_read_by_settings_only,
    the_system_role_stays_with_its_users,
    unscoped_classes_stay_with_their_users,
    yielding_dependencies_end_before_the_answer,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sources() -> list[Source]:
    return sources_below(ROOT / "src" / "parley")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_source_keeps_the_rule(sources: list[Source], rule: Rule) -> None:
    assert rule(sources) == []


@pytest.mark.parametrize("folder", ["tests", "migrations", "benchmarks"])
def test_ignores_carry_a_reason_everywhere(folder: str) -> None:
    # A file that feeds a rule a bad source holds one.
    assert ignores_carry_a_code_and_a_reason(sources_below(ROOT / folder)) == []


# -- the rules themselves ------------------------------------------------------------------------------------------

_SESSION = "async def session():\n    yield 1\n"

BAD: tuple[tuple[Rule, str, str, str], ...] = (
    (
        unscoped_classes_stay_with_their_users,
        "tasks/service.py",
        "from parley.identity.repository import UnscopedIdentityRepository\n",
        "tasks/service.py:1 UnscopedIdentityRepository",
    ),
    (
        unscoped_classes_stay_with_their_users,
        "tasks/tools.py",
        "from parley.tenancy import service\nasync def run(unit):\n    return service.UnscopedWorkspaces(unit)\n",
        "tasks/tools.py:3 UnscopedWorkspaces",
    ),
    (
        the_system_role_stays_with_its_users,
        "tasks/service.py",
        "async def run(database):\n    async with database.system_unit_of_work() as unit:\n        return unit\n",
        "tasks/service.py:2 system_unit_of_work",
    ),
    (
        the_system_role_stays_with_its_users,
        "chat/turns.py",
        "async def run(database):\n    return await database.connect_system()\n",
        "chat/turns.py:2 connect_system",
    ),
    (
        engines_are_used_through_units_of_work,
        "tasks/repository.py",
        "async def run(self):\n    async with self._database.app.connect() as c:\n        return c\n",
        "tasks/repository.py:2 self._database.app.connect",
    ),
    (
        only_the_unit_of_work_ends_transactions,
        "tasks/service.py",
        "async def run(unit):\n    await unit.session.commit()\n",
        "tasks/service.py:2 unit.session.commit",
    ),
    (
        only_the_unit_of_work_ends_transactions,
        "tasks/repository.py",
        "async def run(self):\n    await self._unit.session.rollback()\n",
        "tasks/repository.py:2 self._unit.session.rollback",
    ),
    (
        yielding_dependencies_end_before_the_answer,
        "tasks/dependencies.py",
        f"from fastapi import Depends\n{_SESSION}Session = Depends(session)\n",
        "tasks/dependencies.py:4 Depends(session)",
    ),
    (
        yielding_dependencies_end_before_the_answer,
        "tasks/dependencies.py",
        f"import fastapi\n{_SESSION}Session = fastapi.Depends(session, scope='request')\n",
        "tasks/dependencies.py:4 Depends(session)",
    ),
    (modules_are_named_after_what_they_are, "tasks/utils.py", "", "tasks/utils.py"),
    (modules_are_named_after_what_they_are, "chat/tasks.py", "", "chat/tasks.py"),
    (files_are_short, "tasks/service.py", "x = 1\n" * (MAX_LINES + 1), f"tasks/service.py: {MAX_LINES + 1} lines"),
    (models_are_read_at_run_time, "a/models.py", "from __future__ import annotations\n", "a/models.py"),
    (
        nothing_happens_at_import,
        "core/db.py",
        "from sqlalchemy.ext.asyncio import create_async_engine\nengine = create_async_engine('postgresql://')\n",
        "core/db.py:2 create_async_engine",
    ),
    (
        nothing_happens_at_import,
        "core/db.py",
        "class A:\n    x: str = open('/etc/passwd')\n",
        "core/db.py:2 open",
    ),
    (
        nothing_happens_at_import,
        "llm/registry.py",
        "import os\nKEY = os.environ['OPENAI_API_KEY']\n",
        "llm/registry.py:2 os.environ",
    ),
    (
        nothing_happens_at_import,
        "core/db.py",
        "def find(settings=load_settings()):\n    return settings\n",
        "core/db.py:1 load_settings",
    ),
    (
        the_environment_is_read_by_settings_only,
        "llm/registry.py",
        "import os\ndef key():\n    return os.environ.get('OPENAI_API_KEY')\n",
        "llm/registry.py:3 os.environ",
    ),
    (
        some_libraries_have_one_place,
        "identity/service.py",
        "from jose import jwt\n",
        "identity/service.py:1 jose",
    ),
    (
        http_clients_are_made_in_one_place,
        "llm/adapters/openai.py",
        "import httpx\ndef client():\n    return httpx.AsyncClient()\n",
        "llm/adapters/openai.py:3 httpx.AsyncClient",
    ),
    *(
        (nothing_else_reaches_out, path, text, found)
        for path, text, found in (
            ("chat/tools.py", "import httpx\n", "chat/tools.py:1 httpx"),
            ("tasks/tools.py", "from urllib.request import urlopen\n", "tasks/tools.py:1 urllib.request"),
            ("tasks/tools.py", "from urllib import request\n", "tasks/tools.py:1 urllib.request"),
            ("tasks/tools.py", "def f():\n    import requests\n", "tasks/tools.py:2 requests"),
            ("usage/service.py", "from http import client\n", "usage/service.py:1 http.client"),
            ("llm/tools.py", "import aiohttp.web\n", "llm/tools.py:1 aiohttp"),
            ("llm/adapters/new.py", "import openai\n", "llm/adapters/new.py:1 openai"),
            ("chat/titles.py", "from socket import socket\n", "chat/titles.py:1 socket"),
            (
                "llm/adapters/new.py",
                "import httpx\nasync def f():\n    return httpx.get('https://a.test')\n",
                "llm/adapters/new.py:3 httpx.get",
            ),
            (
                "llm/adapters/new.py",
                "import httpx\ndef f():\n    return httpx.AsyncHTTPTransport()\n",
                "llm/adapters/new.py:3 httpx.AsyncHTTPTransport",
            ),
            (
                "tasks/service.py",
                "import asyncio\nasync def f():\n    return await asyncio.open_connection('a.test', 443)\n",
                "tasks/service.py:3 asyncio.open_connection",
            ),
            (
                "tasks/service.py",
                "async def f(loop):\n    return await loop.create_connection(None, 'a.test', 443)\n",
                "tasks/service.py:2 loop.create_connection",
            ),
            (
                "tasks/service.py",
                "def f():\n    return __import__('socket')\n",
                "tasks/service.py:2 __import__",
            ),
            (
                "chat/attachments.py",
                "from parley.core.http import create_http_client\ndef f():\n    return create_http_client()\n",
                "chat/attachments.py:1 create_http_client",
            ),
            (
                "llm/factory.py",
                "from parley.core import http\ndef f(guard):\n    return http.create_guarded_client(guard)\n",
                "llm/factory.py:3 http.create_guarded_client",
            ),
        )
    ),
    (ignores_carry_a_code_and_a_reason, "a.py", "x = 1  # type: " + "ignore\n", "a.py:1 # type: " + "ignore"),
    (
        ignores_carry_a_code_and_a_reason,
        "a.py",
        "x = 1  # type: " + "ignore[misc]\n",
        "a.py:1 # type: " + "ignore[misc]",
    ),
)


@pytest.mark.parametrize(("rule", "path", "text", "found"), BAD, ids=lambda value: getattr(value, "__name__", ""))
def test_a_bad_source_is_noticed(rule: Rule, path: str, text: str, found: str) -> None:
    assert rule([Source(path, text)]) == [found]


GOOD: tuple[tuple[Rule, str, str], ...] = (
    (unscoped_classes_stay_with_their_users, "tenancy/repository.py", "class UnscopedThings:\n    pass\n"),
    (
        yielding_dependencies_end_before_the_answer,
        "core/dependencies.py",
        f"from fastapi import Depends\n{_SESSION}Session = Depends(session, scope='function')\n",
    ),
    (nothing_happens_at_import, "core/db.py", "def engine():\n    return create_engine('x')\nf = lambda: open('x')\n"),
    (modules_are_named_after_what_they_are, "tasks/service.py", ""),
    (files_are_short, "tasks/service.py", "x = 1\n" * MAX_LINES),
    (ignores_carry_a_code_and_a_reason, "a.py", "x = 1  # type: ignore[misc, attr-defined]  # as above\n"),
)  # fmt: skip


@pytest.mark.parametrize(("rule", "path", "text"), GOOD, ids=lambda value: getattr(value, "__name__", ""))
def test_a_good_source_is_left_alone(rule: Rule, path: str, text: str) -> None:
    assert rule([Source(path, text)]) == []


def test_every_rule_was_seen_red() -> None:
    assert {rule for rule, *_ in BAD} == set(RULES)


# -- the sample of the settings --------------------------------------------------------------------------------------

_ASSIGNED = re.compile(r"^\s*(?:#\s*)?([A-Z][A-Z0-9_]*)=", re.MULTILINE)
_NAMED = re.compile(r"\$\{([A-Z][A-Z0-9_]*)")


def setting_names(settings: type[BaseModel] = Settings, prefix: str = "PARLEY") -> set[str]:
    """Return the environment variables that the settings are read from."""
    names = set()
    for field, info in settings.model_fields.items():
        name = f"{prefix}_{field.upper()}"
        groups = [kind for kind in (info.annotation, *get_args(info.annotation)) if isinstance(kind, type)]
        group = next((kind for kind in groups if issubclass(kind, BaseModel)), None)
        names |= setting_names(group, name) if group else {name}
    return names


def differences(sample: str, known: set[str], also: set[str]) -> Mapping[str, list[str]]:
    """Return what a sample of the settings leaves out, what it makes up, and what it says twice."""
    said = _ASSIGNED.findall(sample)
    return {
        "missing": sorted(known - set(said)),
        "unknown": sorted(set(said) - known - also),
        "twice": sorted({name for name in said if said.count(name) > 1}),
    }


def test_the_sample_of_the_settings_is_whole() -> None:
    sample = ROOT / ".env.example"
    assert sample.is_file(), ".env.example is not there; it must name " + ", ".join(sorted(setting_names()))
    providers = set(_NAMED.findall((ROOT / "llm_registry.yaml").read_text()))

    assert differences(sample.read_text(), setting_names(), providers) == {"missing": [], "unknown": [], "twice": []}


def test_names_of_groups_are_part_of_the_names() -> None:
    names = setting_names()

    assert {"PARLEY_PORT", "PARLEY_SECRET_KEY", "PARLEY_DATABASE_SYSTEM_URL", "PARLEY_REALTIME_TICK_MS"} <= names
    assert "PARLEY_DATABASE" not in names


def test_a_sample_that_differs_is_noticed() -> None:
    sample = "# Of PARLEY_HOST: nothing\nPARLEY_PORT=3000\n# OPENAI_API_KEY=\nPARLEY_PROT=1\n#PARLEY_PORT=\n"

    assert differences(sample, {"PARLEY_PORT", "PARLEY_HOST"}, {"OPENAI_API_KEY"}) == {
        "missing": ["PARLEY_HOST"],
        "unknown": ["PARLEY_PROT"],
        "twice": ["PARLEY_PORT"],
    }
