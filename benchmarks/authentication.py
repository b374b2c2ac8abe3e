"""`authentication`: what a credential costs a request, with the session's look-up remembered and without."""

from contextlib import ExitStack
from typing import Any

from benchmarks.figures import Figure, Measurement, median
from benchmarks.processes import ask
from benchmarks.servers import parley

_PATH = "/api/v1/models"
_ROUND_S = 2.5


def measure(*, full: bool) -> list[Measurement]:
    """Load three ways of asking in turns."""
    rounds = 10 if full else 5
    with ExitStack() as stack:
        cached = stack.enter_context(parley())
        uncached = stack.enter_context(parley(PARLEY_AUTH_SESSION_CACHE_S="0"))
        targets = [
            {"port": cached.port, "pid": cached.pid, "paths": ["/health/live"]},
            {"port": cached.port, "pid": cached.pid, "paths": [_PATH], "token": cached.sign_up().token},
            {"port": uncached.port, "pid": uncached.pid, "paths": [_PATH], "token": uncached.sign_up().token},
        ]
        found = ask(
            "task_read", {"rounds": rounds, "targets": targets, "token": "none"}, timeout_s=60 + rounds * 6 * _ROUND_S
        )
    nobody, remembered, looked_up = found["targets"]

    def added(target: dict[str, Any], to: dict[str, Any]) -> float:
        return median([a - b for a, b in zip(target["cpu_us"], to["cpu_us"], strict=True)])

    wrong = sum(target["wrong"] for target in found["targets"])
    figures = [
        Figure(name="request without a credential", value=median(nobody["cpu_us"]), unit="µs CPU",
               note=f"{median(nobody['rates']):,.0f} requests/s"),
        Figure(name="with a token, session remembered: more", value=added(remembered, nobody), unit="µs CPU",
               note=f"{median(remembered['rates']):,.0f} requests/s; its route's own work is in it"),
        Figure(name="session looked up each time: more than remembered", value=added(looked_up, remembered),
               unit="µs CPU", note=f"{median(looked_up['rates']):,.0f} requests/s"),
        Figure(name="answers that were not 200", value=wrong, unit="answers", most=0),
    ]  # fmt: skip
    method = (
        f"GET /health/live, GET {_PATH} (no query of its own) with an access token, and the same on a server whose "
        "session cache is off, over 24 kept-alive connections, one process each, "
        f"{rounds} rounds of {_ROUND_S:g} s in turns after one that is not counted; CPU of the serving process."
    )
    return [Measurement(name="authentication", method=method, figures=figures)]
