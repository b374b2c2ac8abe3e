"""Where a terminal keeps its session: one private file per server."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from parley.client.http import Tokens


def session_path(server: str, environ: Mapping[str, str]) -> Path:
    """Return the file of a server's session, below `~/.config/parley`."""
    base = environ.get("XDG_CONFIG_HOME") or Path(environ.get("HOME") or Path.home()) / ".config"
    host = re.sub(r"[^a-z0-9.-]", "_", urlsplit(server).netloc.lower())
    return Path(base) / "parley" / f"session-{host}.json"


class SessionFile:
    """A session on disk, readable by its owner only."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> Tokens | None:
        """Return the session, or None where there is none that can be read."""
        try:
            return Tokens(**json.loads(self.path.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def save(self, tokens: Tokens | None) -> None:
        """Keep a session; None removes the file."""
        if tokens is None:
            self.path.unlink(missing_ok=True)
            return
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # A name of its own and then a rename: another terminal never reads half a file.
        draft = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        draft.unlink(missing_ok=True)
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(tokens.as_dict(), file)
        draft.replace(self.path)
