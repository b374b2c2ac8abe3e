"""`start`: from the command to the first answer, on an empty data directory and on one that is there."""

import time

from benchmarks.figures import Figure, Measurement, median
from benchmarks.servers import parley, scratch


def measure(*, full: bool) -> list[Measurement]:
    """Start and stop servers."""
    cold: list[float] = []
    warm: list[float] = []
    rounds = 5 if full else 2
    for _ in range(rounds):
        with scratch() as folder:
            for times in (cold, warm):
                began = time.monotonic()
                with parley(folder=folder):
                    times.append(time.monotonic() - began)
    return [
        Measurement(
            name="start",
            method=(
                f"`parley serve` to its first 200 from /health/ready, {rounds} times each, the median. Cold: the data "
                "directory is empty, so the database is made and migrated. Dependencies are installed."
            ),
            figures=[
                Figure(name="cold start to the first answer", value=median(cold), unit="s", most=20),
                Figure(name="warm start to the first answer", value=median(warm), unit="s", most=3),
            ],
        )
    ]
