"""What a measurement found, and the table of it."""

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A measured number beside what it must reach. `most` and `least` are the target, if there is one."""

    name: str
    value: float
    unit: str
    most: float | None = None
    least: float | None = None
    note: str = ""

    @property
    def target(self) -> str:
        """The target as the design writes it."""
        if self.most is not None:
            return f"≤ {self.most:g} {self.unit}"
        return f"≥ {self.least:g} {self.unit}" if self.least is not None else ""

    @property
    def verdict(self) -> str:
        """Whether the target was reached."""
        if self.most is None and self.least is None:
            return ""
        reached = (self.most is None or self.value <= self.most) and (self.least is None or self.value >= self.least)
        return "reached" if reached else "MISSED"

    @property
    def shown(self) -> str:
        """The value in three or so digits."""
        return f"{self.value:,.0f} {self.unit}" if self.value >= 100 else f"{self.value:.3g} {self.unit}"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One benchmark's figures and how they were taken."""

    name: str
    method: str
    figures: Sequence[Figure]


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which this share of the values lies (the nearest that was measured)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def median(values: Sequence[float]) -> float:
    """Return the value in the middle."""
    return percentile(values, 0.5)


def table(measurement: Measurement) -> str:
    """Return a measurement as plain text."""
    rows = [(f.name, f.shown, f.target, f.verdict, f.note) for f in measurement.figures]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [f"{measurement.name}", textwrap.indent(textwrap.fill(measurement.method, 116), "  ")]
    for name, shown, target, verdict, note in rows:
        line = f"  {name:{widths[0]}}  {shown:>{widths[1]}}  {target:{widths[2]}}  {verdict:{widths[3]}}  {note}"
        lines.append(line.rstrip())
    return "\n".join(lines) + "\n"


def as_json(measurements: Iterable[Measurement]) -> list[dict[str, object]]:
    """Return measurements as plain values."""
    return [
        {
            "name": one.name,
            "method": one.method,
            "figures": [
                {
                    "name": f.name,
                    "value": f.value,
                    "unit": f.unit,
                    "target": f.target,
                    "verdict": f.verdict,
                    "note": f.note,
                }
                for f in one.figures
            ],
        }
        for one in measurements
    ]
