"""Measures Parley on this machine: `python -m benchmarks [NAME ...] [--full] [--json FILE]`, or `make bench`."""

import argparse
import importlib
import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path

import orjson

from benchmarks.figures import Measurement, as_json, table
from benchmarks.processes import raise_file_limit

NAMES = (
    "first-token", "relay", "dialect", "task-read", "authentication", "sign-in", "send", "resume", "idle", "start",
    "capacity", "take-over", "slow-client", "storm", "deploy",
    "long-conversation",
)  # fmt: skip


def _about() -> dict[str, str]:
    load = " ".join(f"{value:.2f}" for value in os.getloadavg())
    return {
        "at": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "load before": load,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"which to run: {', '.join(NAMES)}; all if none is named"
    )
    parser.add_argument("--full", action="store_true", help="more replies, more connections, longer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file too")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(NAMES):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    raise_file_limit()
    about = _about()
    print("\n".join(f"{name}: {value}" for name, value in about.items()) + "\n", flush=True)
    measured: list[Measurement] = []
    began = time.monotonic()
    for name in arguments.names or NAMES:
        module = importlib.import_module(f"benchmarks.{name.replace('-', '_')}")
        for one in module.measure(full=arguments.full):
            measured.append(one)
            print(table(one), flush=True)
    print(f"{time.monotonic() - began:.0f} s in all")
    if arguments.json:
        arguments.json.write_bytes(
            orjson.dumps({**about, "measurements": as_json(measured)}, option=orjson.OPT_INDENT_2) + b"\n"
        )


if __name__ == "__main__":
    main()
