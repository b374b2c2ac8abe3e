"""Prompts are Jinja2 files below one directory, named `<module>/<use>.md.j2`.

All are read and compiled at start, so a syntax error stops the process and rendering touches no disk.
"""

import hashlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from jinja2 import DictLoader, StrictUndefined, Template, TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from parley.llm.errors import PromptInvalid

logger = logging.getLogger(__name__)

SUFFIX = ".md.j2"
FALLBACK = "fallback"

FEATURES: Final[Mapping[str, str]] = {
    "chat/continue": "continue",
    "chat/title": "titles",
    "structured": "structured",
    "structured_repair": "structured",
    FALLBACK: "fallback",
}
"""What uses a prompt, by its name, where it is no assistant's. A test finds one that stands nowhere."""

_USE = re.compile(r"[a-z0-9][a-z0-9_-]*(/[a-z0-9][a-z0-9_-]*)*")


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A prompt and where it came from: `sha256` is of the template file, `path` relative to the directory."""

    text: str
    path: str
    sha256: str


@dataclass(frozen=True, slots=True)
class _Prompt:
    template: Template
    path: str
    sha256: str


class PromptLibrary:
    """The prompts of one directory. `fallbacks` counts how often one was missing."""

    def __init__(self, prompts: Mapping[str, _Prompt]) -> None:
        self._prompts = dict(prompts)
        self.fallbacks = 0

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read and compile every template. Raises `PromptInvalid`."""
        sources: dict[str, str] = {}
        for file in sorted(directory.rglob(f"*{SUFFIX}")):
            path = file.relative_to(directory).as_posix()
            try:
                sources[path] = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise PromptInvalid(path, None, "the file cannot be read as UTF-8 text") from error
        if FALLBACK + SUFFIX not in sources:
            raise PromptInvalid(FALLBACK + SUFFIX, None, f"there is no such file in {directory}; it must exist")
        # Prompts are text for a model, not HTML: escaping would change what the user wrote.
        environment = ImmutableSandboxedEnvironment(
            loader=DictLoader(sources),
            undefined=StrictUndefined,
            autoescape=False,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        prompts = {}
        for path, source in sources.items():
            try:
                template = environment.get_template(path)
            except TemplateSyntaxError as error:
                raise PromptInvalid(path, error.lineno, error.message or "the template cannot be parsed") from error
            digest = hashlib.sha256(source.encode()).hexdigest()
            prompts[path.removesuffix(SUFFIX)] = _Prompt(template, path, digest)
        return cls(prompts)

    @property
    def files(self) -> list[tuple[str, str, str]]:
        """Every prompt, by name: its use, the path of its file, the file's SHA-256."""
        return [(use, prompt.path, prompt.sha256) for use, prompt in sorted(self._prompts.items())]

    def render(self, use: str, **variables: Any) -> RenderedPrompt:
        """Render the prompt of a use such as `chat/general`. A missing one falls back to `fallback`.

        Raises `PromptInvalid` when the template needs a variable that is not given, and for a name that is no name.
        """
        if not _USE.fullmatch(use):
            raise PromptInvalid(use, None, "a prompt is named like chat/general")
        prompt = self._prompts.get(use)
        if prompt is None:
            self.fallbacks += 1
            logger.warning("There is no prompt %s; the fallback is used", use)
            prompt = self._prompts[FALLBACK]
        try:
            text = prompt.template.render(variables).strip()
        except TemplateError as error:
            raise PromptInvalid(prompt.path, None, str(error)) from error
        return RenderedPrompt(text=text, path=prompt.path, sha256=prompt.sha256)
