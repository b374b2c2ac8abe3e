"""What a run says: a line for each check, and a summary; or JSON."""

import sys
from collections import Counter
from collections.abc import Sequence
from typing import TextIO

import orjson

from parley.conformance.runner import Result
from parley.conformance.section import Check

_SHOWN = 60


class Report:
    """Writes results as they come."""

    def __init__(self, out: TextIO | None = None, *, verbose: bool = False) -> None:
        self._out = out or sys.stdout
        self._verbose = verbose

    def result(self, result: Result) -> None:
        """Write a check's line, and on failure why."""
        check = result.check
        self._line(f"{result.outcome:7}  {check.section:11}  {check.name}  ({result.ms} ms)")
        if result.outcome == "skipped":
            self._line(f"         {result.reason}")
        if result.outcome != "FAILED":
            return
        self._line(f"         {check.says}")
        self._line(f"         but: {result.reason}")
        for frame in result.frames:
            self._line(f"           {frame}")
        if self._verbose:
            self._line("         all that was said:")
            left_out = len(result.transcript) - _SHOWN
            if left_out > 0:
                self._line(f"           ({left_out} lines before these)")
            for line in result.transcript[-_SHOWN:]:
                self._line(f"           {line}")

    def summary(self, results: Sequence[Result], *, seconds: float, url: str) -> None:
        """Write how it went in all."""
        counts = Counter(result.outcome for result in results)
        self._line("")
        self._line(
            f"{url}: {counts['ok']} ok, {counts['FAILED']} failed, {counts['skipped']} skipped in {seconds:.1f} s"
        )
        for result in results:
            if result.outcome == "FAILED":
                self._line(f"  {result.check.id}: {result.reason}")

    def listed(self, checks: Sequence[Check]) -> None:
        """Write the checks that there are."""
        for check in checks:
            self._line(f"{check.id:42} {check.says}{' (--slow)' if check.slow else ''}")

    def json(self, results: Sequence[Result], *, seconds: float, url: str) -> None:
        """Write all results as one JSON document."""
        counts = Counter(result.outcome for result in results)
        document = {
            "url": url,
            "seconds": round(seconds, 1),
            "ok": counts["ok"],
            "failed": counts["FAILED"],
            "skipped": counts["skipped"],
            "checks": [
                {
                    "id": result.check.id,
                    "says": result.check.says,
                    "outcome": result.outcome.lower(),
                    "ms": result.ms,
                    "reason": result.reason or None,
                    "frames": result.frames,
                }
                for result in results
            ],
        }
        self._line(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode())

    def _line(self, text: str) -> None:
        self._out.write(text.rstrip() + "\n")
        self._out.flush()
