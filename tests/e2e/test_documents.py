"""The API's documents in a browser, without anything from elsewhere."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.process import server_process

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.process,
    pytest.mark.skipif(
        BROWSER is None and "PARLEY_CI" not in os.environ, reason="Chromium is not here; `make ci` installs it"
    ),
]


def _rendered(url: str, profile: Path) -> str:
    """Return a page's DOM after its scripts have run."""
    assert BROWSER is not None
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--virtual-time-budget=15000",
    ]
    done = subprocess.run(
        [BROWSER, *flags, f"--user-data-dir={profile}", "--dump-dom", url], capture_output=True, timeout=90, check=True
    )
    return done.stdout.decode()


def test_the_documents_render_and_load_nothing_from_elsewhere(tmp_path: Path) -> None:
    with server_process(tmp_path / "data") as server:
        for page in ("docs", "redoc"):
            source = httpx.get(f"{server.url}/{page}").text
            assert not re.findall(r"(?:src|href)=\"(?:https?:)?//", source), "a page of ours names another host"
        dom = _rendered(f"{server.url}/docs", tmp_path / "profile")
        assert "/api/v1/conversations/{conversation_id}/messages" in re.sub(r"<wbr/?>|\u200b|<!-- -->", "", dom)
        assert "opblock-post" in dom
        home = _rendered(f"{server.url}/", tmp_path / "profile")
        assert "The server is running" in home
