"""Runs one measurement's client in this process: `python -m benchmarks.client NAME`, JSON in, JSON out."""

import gc
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.processes import raise_file_limit


def main() -> None:
    module = importlib.import_module(f"benchmarks.{sys.argv[1]}")
    specification = json.load(sys.stdin)
    raise_file_limit()
    # A pause of the measuring process would be read as one of the server.
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)
    found: dict[str, Any] = uvloop.run(module.client(specification))
    sys.stdout.write(json.dumps(found))
    sys.stdout.flush()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
