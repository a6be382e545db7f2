"""What a GPU's clocks, power and temperature were, from nvidia-smi's query interface; nothing but the standard
library, so that it also runs where PyTorch does not.

A rate means little without them: a card that is held back by power or heat runs the same kernel slower.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from typing import Any

FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "enforced.power.limit", "temperature.gpu")
# The bit mask of what holds the clocks back; drivers before 535 know it by its second name alone.
REASON_FIELDS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clocks",
}
_UNITS = ",nounits"


def query_command(reason_field: str = REASON_FIELDS[0]) -> list[str]:
    """One line of numbers per query; `-l SECONDS` may be added to repeat it."""
    fields = ",".join((*FIELDS, reason_field))
    return ["nvidia-smi", "-i", "0", f"--query-gpu={fields}", f"--format=csv,noheader{_UNITS}"]


def parse_line(line: str) -> dict[str, Any] | None:
    """One answer as numbers (MHz, W, degrees Celsius) and the reasons as words; None for a line of another kind."""
    cells = [cell.strip() for cell in line.split(",")]
    if len(cells) != len(FIELDS) + 1:
        return None
    values: dict[str, Any] = {}
    for name, cell in zip(FIELDS, cells, strict=False):
        try:
            values[name] = float(cell)
        except ValueError:  # "[N/A]" where the card does not tell
            values[name] = None
    if all(value is None for value in values.values()):
        return None
    try:
        mask = int(cells[-1], 16)
    except ValueError:
        values["held back by"] = None
        return values
    values["held back by"] = [word for bit, word in REASONS.items() if mask & bit]
    return values


def read_clocks() -> dict[str, Any] | None:
    """The state now; None without a GPU or its tool."""
    for reason_field in REASON_FIELDS:
        try:
            done = subprocess.run(
                query_command(reason_field), capture_output=True, text=True, timeout=20, check=True
            )
        except (OSError, subprocess.SubprocessError):
            continue
        return parse_line(done.stdout.strip().splitlines()[0]) if done.stdout.strip() else None
    return None


def summarize(lines: Iterable[str]) -> dict[str, Any]:
    """Lowest, middle and highest of every number over many answers, and the share of each reason that was seen."""
    answers = [answer for answer in map(parse_line, lines) if answer is not None]
    summary: dict[str, Any] = {"answers": len(answers)}
    for name in FIELDS:
        values = sorted(answer[name] for answer in answers if answer[name] is not None)
        if values:
            summary[name] = [values[0], values[len(values) // 2], values[-1]]
    reasons = [word for answer in answers for word in answer["held back by"] or ()]
    summary["held back by"] = {word: reasons.count(word) / len(answers) for word in dict.fromkeys(reasons)}
    return summary
