"""Settings: what is read in which order, and what is refused by name and never by value."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parley.core import settings as module
from parley.core.settings import DevelopmentSettings, Environment, ProductionSettings, SettingsInvalid, load_settings
from parley.llm.errors import PromptInvalid, RegistryInvalid
from parley.main import create_app

CANARY = "canary-value-93f1"
GOOD_KEY = "k3Jd8sPq0ZbN1xVw7uTy5rGc2mHf9aLe4oXi6B"
PRODUCTION = {
    "PARLEY_ENV": "production",
    "PARLEY_SECRET_KEY": GOOD_KEY,
    "PARLEY_PUBLIC_URL": "https://app.example.com",
    "PARLEY_DATABASE_URL": "embedded",
}

Set = Callable[..., None]


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin without any setting."""
    for name in list(os.environ):
        if name.upper().startswith("PARLEY_"):
            monkeypatch.delenv(name)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Set:
    """Set variables of the environment."""

    def put(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


def refusal(directory: Path, **overrides: Any) -> str:
    """Return what a start with these settings says."""
    with pytest.raises(SettingsInvalid) as refused:
        load_settings(directory, **overrides)
    return str(refused.value)


# -- classes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [("", DevelopmentSettings), ("development", DevelopmentSettings), ("testing", module.TestingSettings)],
)
def test_each_environment_has_its_class(tmp_path: Path, environment: Set, name: str, kind: type) -> None:
    environment(PARLEY_ENV=name)
    settings = load_settings(tmp_path)
    assert type(settings) is kind
    assert not settings.is_production
    assert settings.host == "127.0.0.1"
    assert settings.uses_embedded_postgres


def test_production_is_its_own_class(tmp_path: Path, environment: Set) -> None:
    environment(**PRODUCTION)
    settings = load_settings(tmp_path)
    assert type(settings) is ProductionSettings
    assert settings.is_production
    assert settings.host == "0.0.0.0"
    assert settings.base_url == "https://app.example.com"


@pytest.mark.parametrize("name", ["prod", "Production ", CANARY, "dev"])
def test_an_unknown_environment_is_refused(tmp_path: Path, environment: Set, name: str) -> None:
    environment(PARLEY_ENV=name)
    text = refusal(tmp_path)
    assert "PARLEY_ENV" in text
    assert name not in text.replace("production", "").replace("development", "")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"PARLEY_SECRET_KEY": ""}, "PARLEY_SECRET_KEY"),
        ({"PARLEY_SECRET_KEY": "short-canary-key"}, "PARLEY_SECRET_KEY"),
        ({"PARLEY_SECRET_KEY": "a" * 64}, "PARLEY_SECRET_KEY"),
        ({"PARLEY_SECRET_KEY": "changeme-changeme-changeme-changeme-123"}, "PARLEY_SECRET_KEY"),
        ({"PARLEY_SECRET_KEY": "my-SECRET-key-0123456789-abcdefghijklmnop"}, "PARLEY_SECRET_KEY"),
        ({"PARLEY_SECRET_KEY": f"{GOOD_KEY},weak-canary"}, "PARLEY_SECRET_KEY"),
        ({"PARLEY_PUBLIC_URL": ""}, "PARLEY_PUBLIC_URL"),
        ({"PARLEY_PUBLIC_URL": "app.example.com"}, "PARLEY_PUBLIC_URL"),
        ({"PARLEY_PUBLIC_URL": "ftp://app.example.com"}, "PARLEY_PUBLIC_URL"),
        ({"PARLEY_DATABASE_URL": ""}, "PARLEY_DATABASE_URL"),
        ({"PARLEY_DATABASE_URL": f"postgresql://u:{CANARY}@db/x"}, "PARLEY_DATABASE_SYSTEM_URL"),
        ({"PARLEY_RATE_LIMITS": "off"}, "PARLEY_RATE_LIMITS"),
    ],
)  # fmt: skip
def test_production_refuses_what_is_missing_or_weak(
    tmp_path: Path, environment: Set, changed: dict[str, str], named: str
) -> None:
    environment(**(PRODUCTION | changed))
    text = refusal(tmp_path)
    assert named in text
    for value in changed.values():
        for piece in value.split(","):
            assert not piece or piece in {"off", GOOD_KEY} or piece not in text
    assert CANARY not in text
    assert GOOD_KEY not in text


def test_all_problems_are_told_at_once(tmp_path: Path, environment: Set) -> None:
    environment(PARLEY_ENV="production", PARLEY_RATE_LIMITS="off")
    text = refusal(tmp_path)
    for name in ("PARLEY_SECRET_KEY", "PARLEY_PUBLIC_URL", "PARLEY_DATABASE_URL", "PARLEY_RATE_LIMITS"):
        assert name in text


@pytest.mark.parametrize(
    ("name", "value"),
    [("PARLEY_ROLE", "sockets"), ("PARLEY_WORKERS", "0"), ("PARLEY_JOBS", "celery")],
)
def test_what_this_version_cannot_do_is_refused_and_not_ignored(
    tmp_path: Path, environment: Set, name: str, value: str
) -> None:
    environment(**{name: value})
    assert name in refusal(tmp_path)


# -- layers --------------------------------------------------------------------------------------------------------


def test_later_layers_win(tmp_path: Path, environment: Set) -> None:
    (tmp_path / ".env").write_text("PARLEY_PORT=1001\nPARLEY_LOG_LEVEL=DEBUG\nPARLEY_HOST=10.0.0.1\nOTHER=first\n")
    assert load_settings(tmp_path).port == 1001
    (tmp_path / ".env.local").write_text("PARLEY_PORT=1002\nPARLEY_HOST=10.0.0.2\n")
    assert load_settings(tmp_path).port == 1002
    (tmp_path / ".env.development").write_text("PARLEY_PORT=1003\n")
    (tmp_path / ".env.testing").write_text("PARLEY_PORT=1999\n")
    settings = load_settings(tmp_path)
    assert (settings.port, settings.host, settings.log.level) == (1003, "10.0.0.2", "DEBUG")
    environment(PARLEY_PORT="1004")
    assert load_settings(tmp_path).port == 1004
    assert load_settings(tmp_path, port=1005).port == 1005
    assert load_settings(tmp_path).environ["OTHER"] == "first"
    environment(OTHER="second")
    assert load_settings(tmp_path).environ["OTHER"] == "second"


def test_the_environment_may_be_named_in_a_file(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("PARLEY_ENV=testing\n")
    (tmp_path / ".env.testing").write_text("PARLEY_PORT=1234\n")
    settings = load_settings(tmp_path)
    assert (type(settings), settings.port) == (module.TestingSettings, 1234)
    (tmp_path / ".env.local").write_text("PARLEY_ENV=development\n")
    settings = load_settings(tmp_path)
    assert (type(settings), settings.port) == (DevelopmentSettings, 3000)


def test_groups_are_named_with_one_underscore(tmp_path: Path, environment: Set) -> None:
    environment(
        PARLEY_DATABASE_POOL_SIZE="7",
        PARLEY_DATABASE_URL="postgresql://u@h/x",
        PARLEY_REALTIME_ACK_WINDOW_BYTES="2048",
        PARLEY_AUTH_ACCESS_TOKEN_MINUTES="5",
        PARLEY_LLM_TOOL_TIMEOUT_S="1.5",
        PARLEY_LOG_FILES="false",
        parley_log_level="ERROR",
    )
    settings = load_settings(tmp_path)
    assert (settings.database.pool_size, settings.database.url) == (7, "postgresql://u@h/x")
    assert (settings.realtime.ack_window_bytes, settings.auth.access_token_minutes) == (2048, 5)
    assert (settings.llm.tool_timeout_s, settings.log.files, settings.log.level) == (1.5, False, "ERROR")


def test_an_empty_variable_is_unset(tmp_path: Path, environment: Set) -> None:
    environment(PARLEY_PORT="", PARLEY_DATABASE_POOL_SIZE="", PARLEY_CORS_ORIGINS="", PARLEY_SECRET_KEY="")
    settings = load_settings(tmp_path)
    assert (settings.port, settings.database.pool_size, settings.cors_origins, settings.secret_key) == (
        3000,
        10,
        [],
        [],
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PARLEY_DATABASE_PASSWORD", CANARY),
        ("PARLEY_DATABASE_POOLSIZE", CANARY),
        ("PARLEY_REALTIME_TICK", CANARY),
        ("PARLEY_DATABASE_POOL_SIZE", CANARY),
        ("PARLEY_DATABASE_POOL_SIZE", "0"),
        ("PARLEY_PORT", CANARY),
        ("PARLEY_PORT", "65536"),
        ("PARLEY_WORKERS", CANARY),
        ("PARLEY_RATE_LIMITS", CANARY),
        ("PARLEY_LOG_LEVEL", CANARY),
        ("PARLEY_AUTH_SESSION_CACHE_S", "31"),
        ("PARLEY_AUTH_ACCESS_TOKEN_MINUTES", "1441"),
        ("PARLEY_BODY_BYTES", "-1"),
        ("PARLEY_CORS_ORIGINS", f"https://a.example,https://{CANARY}/path"),
        # A whole group at once is JSON; whoever writes `PARLEY_LOG=debug` is told so.
        ("PARLEY_LOG", CANARY),
        ("PARLEY_DATABASE", f"postgresql://u:{CANARY}@h/x"),
        ("PARLEY_LLM", "5"),
    ],
)  # fmt: skip
def test_a_setting_that_does_not_hold_is_named_without_its_value(
    tmp_path: Path, environment: Set, name: str, value: str
) -> None:
    environment(**{name: value})
    text = refusal(tmp_path)
    assert name in text
    assert CANARY not in text


def test_a_file_that_is_no_text_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"PARLEY_PORT=\xff\xfe\n")
    assert ".env" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("https://a.example", ["https://a.example"]),
        ("https://a.example, http://b.example:8080 ,", ["https://a.example", "http://b.example:8080"]),
        (" , ", []),
    ],
)
def test_lists_are_separated_by_commas(tmp_path: Path, environment: Set, value: str, found: list[str]) -> None:
    environment(PARLEY_CORS_ORIGINS=value, PARLEY_SECRET_KEY="one, two,three")
    settings = load_settings(tmp_path)
    assert settings.cors_origins == found
    assert [key.get_secret_value() for key in settings.secret_key] == ["one", "two", "three"]
    assert "one" not in repr(settings.secret_key)


@pytest.mark.parametrize(
    "origin",
    ["*", "https://*.example.com", "https://a.example/", "https://a.example/x", "a.example", "null", "file:///x",
     "https://", "https://a.example?x=1", "https://a.example#x", "https://user@a.example", "ws://a.example"],
)  # fmt: skip
def test_an_origin_is_exact(tmp_path: Path, environment: Set, origin: str) -> None:
    environment(PARLEY_CORS_ORIGINS=origin)
    assert "PARLEY_CORS_ORIGINS" in refusal(tmp_path)


def test_secrets_do_not_stand_in_the_repr(tmp_path: Path, environment: Set) -> None:
    environment(
        PARLEY_SECRET_KEY=CANARY,
        PARLEY_DATABASE_URL=f"postgresql://u:{CANARY}@h/x",
        PARLEY_REDIS_URL=f"redis://:{CANARY}@h",
    )
    settings = load_settings(tmp_path)
    assert CANARY not in repr(settings)
    assert CANARY not in str(settings)


# -- the files that settings name ----------------------------------------------------------------------------------

REGISTRY = """providers:
  demo: {kind: demo}
models:
  demo: {provider: demo, name: demo}
aliases: {default: [demo]}
"""


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("{provider: demo, name: demo}", "{provider: demo, name: demo, temprature: 1}", 4),
        ("kind: demo", f"kind: demo, api_kee: {CANARY}", 2),
        ("[demo]", "[dmeo]", 5),
        ("provider: demo", "provider: nobody", 4),
        ("aliases:", "alias:", 5),
        ("{kind: demo}", "{kind: demo", 2),
    ],
)
def test_a_mistake_in_the_registry_stops_the_start_with_its_line(tmp_path: Path, old: str, new: str, line: int) -> None:
    path = tmp_path / "llm_registry.yaml"
    path.write_text(REGISTRY.replace(old, new, 1))
    settings = load_settings(tmp_path, env=Environment.TESTING, llm={"registry": path})
    with pytest.raises(RegistryInvalid) as refused:
        create_app(settings)
    assert refused.value.line in {line, line + 1}
    assert CANARY not in str(refused.value)


def test_a_mistake_in_a_template_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "fallback.md.j2").write_text("ok")
    (tmp_path / "bad.md.j2").write_text("a\n{% if %}")
    settings = load_settings(tmp_path, env=Environment.TESTING, llm={"prompts": tmp_path})
    with pytest.raises(PromptInvalid, match=r"bad\.md\.j2, line 2"):
        create_app(settings)
    (tmp_path / "bad.md.j2").unlink()
    (tmp_path / "fallback.md.j2").unlink()
    with pytest.raises(PromptInvalid, match="fallback"):
        create_app(settings)
