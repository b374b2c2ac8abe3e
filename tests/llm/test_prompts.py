import hashlib
import logging
from pathlib import Path

import pytest

from parley.llm.errors import PromptInvalid
from parley.llm.prompts import PromptLibrary

SHIPPED = Path(__file__).parents[2] / "prompts"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "chat").mkdir()
    (tmp_path / "fallback.md.j2").write_text("Answer.", encoding="utf-8")
    (tmp_path / "chat/general.md.j2").write_text("Hello {{ name }}!\n", encoding="utf-8")
    return tmp_path


def test_renders_and_identifies_the_template(directory: Path) -> None:
    prompt = PromptLibrary.load(directory).render("chat/general", name="<Ada & Co>")
    assert prompt.text == "Hello <Ada & Co>!"
    assert prompt.path == "chat/general.md.j2"
    assert prompt.sha256 == hashlib.sha256((directory / "chat/general.md.j2").read_bytes()).hexdigest()


def test_an_undefined_name_is_an_error(directory: Path) -> None:
    with pytest.raises(PromptInvalid, match="'name' is undefined"):
        PromptLibrary.load(directory).render("chat/general")


def test_a_missing_template_falls_back_with_a_warning(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    library = PromptLibrary.load(directory)
    with caplog.at_level(logging.WARNING):
        prompt = library.render("chat/poet", name="x")
    assert (prompt.text, prompt.path, library.fallbacks) == ("Answer.", "fallback.md.j2", 1)
    assert "chat/poet" in caplog.text


def test_a_syntax_error_stops_the_load(directory: Path) -> None:
    (directory / "chat/broken.md.j2").write_text("one\n{% if %}\n", encoding="utf-8")
    with pytest.raises(PromptInvalid, match=r"chat/broken.md.j2, line 2"):
        PromptLibrary.load(directory)


def test_the_fallback_must_exist(directory: Path) -> None:
    (directory / "fallback.md.j2").unlink()
    with pytest.raises(PromptInvalid, match="must exist"):
        PromptLibrary.load(directory)


@pytest.mark.parametrize("use", ["../secret", "chat/../../x", "/etc/passwd", "chat\\general", "", "chat/", "Chat/x"])
def test_a_path_is_not_a_use(directory: Path, use: str) -> None:
    (directory.parent / "secret.md.j2").write_text("secret", encoding="utf-8")
    with pytest.raises(PromptInvalid):
        PromptLibrary.load(directory).render(use)


def test_a_template_cannot_reach_into_python(directory: Path) -> None:
    (directory / "chat/evil.md.j2").write_text("{{ name.__class__.__mro__ }}", encoding="utf-8")
    with pytest.raises(PromptInvalid):
        PromptLibrary.load(directory).render("chat/evil", name="x")


def test_nothing_is_read_from_disk_after_the_load(directory: Path) -> None:
    library = PromptLibrary.load(directory)
    (directory / "chat/general.md.j2").write_text("changed", encoding="utf-8")
    assert library.render("chat/general", name="x").text == "Hello x!"


@pytest.mark.parametrize("use", ["chat/general", "chat/planner"])
def test_the_shipped_prompts_render_with_and_without_variables(use: str) -> None:
    library = PromptLibrary.load(SHIPPED)
    assert library.render(use).text
    text = library.render(use, workspace="Acme", today="2026-01-02", tools=["add_task", "list_tasks"]).text
    assert "Acme" in text
    assert "2026-01-02" in text
    assert "add_task, list_tasks" in text
    assert library.fallbacks == 0
