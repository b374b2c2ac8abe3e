"""One real server process for all of these tests."""

from collections.abc import Iterator

import pytest

from tests.process import ServerProcess, server_process


@pytest.fixture(scope="session")
def conforming(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server as its users start it; only sign-ups are not limited, since every run signs somebody up."""
    data_dir = tmp_path_factory.mktemp("conformance") / "data"
    with server_process(data_dir, PARLEY_LIMITS_SIGNUP_PER_HOUR="1000") as server:
        yield server
