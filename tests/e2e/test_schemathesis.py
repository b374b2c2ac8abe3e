"""Schemathesis over the whole document, signed in: no server error, and no answer that the document does not describe.

`PARLEY_FUZZ_EXAMPLES` raises the number of cases for each operation.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from tests.process import ServerProcess, server_process

pytestmark = pytest.mark.process

SEED = 4711
EXAMPLES = os.environ.get("PARLEY_FUZZ_EXAMPLES", "25")

# They end the session that asks, or have its models asked at a provider that is not there, so each is tried by someone
# who came for it.
ENDS_SESSION = (
    "delete_me", "delete_sessions", "delete_session", "change_password", "sign_out", "switch_workspace",
    "set_provider_key",
)  # fmt: skip

# Left out: that a valid body is never refused (rules such as "the address is taken" are not in a schema), and what
# every method that is not there answers (tests/core/test_hostile_http.py has it).
CHECKS_LEFT_OUT = "positive_data_acceptance,unsupported_method"

# A new workspace is changed with a token for it: `auth/switch` gives one, the id in the path chooses nothing.
# What is too long for its field may be too long for a body: 413 refuses it too, which the tool's own list does not have.
CONFIG = """
[checks]
negative_data_rejection.expected-statuses = [
    "400", "401", "403", "404", "405", "406", "409", "413", "415", "422", "428", "429",
]

[[operations]]
include-path-regex = "/workspaces/"
checks.ensure_resource_availability.enabled = false
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    # Keys of providers are set too, and what is asked with them then stays on this machine.
    nowhere = {"OPENAI_BASE_URL": "http://127.0.0.1:9/v1", "ANTHROPIC_BASE_URL": "http://127.0.0.1:9"}
    with server_process(tmp_path_factory.mktemp("fuzz") / "data", PARLEY_RATE_LIMITS="off", **nowhere) as running:
        yield running


def _sign_up(server: ServerProcess) -> str:
    body = {"email": f"{uuid4()}@example.com", "password": "correct horse 1", "confirmPassword": "correct horse 1"}
    answer = httpx.post(f"{server.url}/api/v1/auth/signup", json=body, trust_env=False)
    token: str = answer.raise_for_status().json()["data"]["access_token"]
    return token


def _fuzz(server: ServerProcess, folder: Path, *options: str) -> None:
    command = [
        str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json",
        "--header", f"Authorization: Bearer {_sign_up(server)}",
        "--exclude-checks", CHECKS_LEFT_OUT, "--seed", str(SEED), "--max-examples", EXAMPLES,
        "--suppress-health-check", "all", "--request-timeout", "10", "--no-color", *options,
    ]  # fmt: skip
    (folder / "schemathesis.toml").write_text(CONFIG)
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=1800, check=False)
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    assert "unexpected error" not in server.log.read_text()


def test_the_whole_document(server: ServerProcess, tmp_path: Path) -> None:
    left_out = [option for name in ENDS_SESSION for option in ("--exclude-operation-id", name)]

    _fuzz(server, tmp_path, "--phases", "examples,coverage,fuzzing,stateful", *left_out)


@pytest.mark.parametrize("name", ENDS_SESSION)
def test_what_ends_a_session(server: ServerProcess, tmp_path: Path, name: str) -> None:
    _fuzz(server, tmp_path, "--phases", "examples,coverage", "--include-operation-id", name)
