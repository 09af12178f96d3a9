"""How fast a run was, in a few numbers: phases in the order of a step, rates, memory."""

from __future__ import annotations

import re

from tools.report.curves import Points, phase_order
from tools.report.headline import Fact, fact

# pattern of a metric, label, unit, scale, and if the largest value is told in place of the median
SPEED = (
    (r"seconds/(.+)", "Time of {}", "s", 1.0, False),
    (r"tokens_per_second/(.+)", "Throughput of {}", "tokens/s", 1.0, False),
    (r"mfu/(.+)", "MFU of {}", "%", 100.0, False),
    (r"sync/gb", "Size of a sync", "GB", 1.0, False),
    (r"sync/gb_per_second", "Rate of a sync", "GB/s", 1.0, False),
    (r"gpu_gb/(.+)", "GPU memory after {}", "GB", 1.0, True),
    (r"host_gb", "Host memory", "GB", 1.0, True),
)
SMALLER = {"s": "ms", "GB": "MB", "GB/s": "MB/s"}
RATES = tuple(unit for unit in (*(row[2] for row in SPEED), *SMALLER.values()) if "/" in unit)
LEAST = 0.1  # of a unit: less is told in the smaller one


def speed_facts(points: Points) -> list[Fact]:
    """Medians of seconds, rates and MFU over the steps but the first, and the most memory."""
    found = []
    for pattern, label, unit, scale, largest in SPEED:
        matches = [match for name in points if (match := re.fullmatch(pattern, name))]
        for match in sorted(matches, key=lambda one: phase_order(what(one))):
            values = points[match[0]][1]
            if known := sorted(value for value in values[1:] or values if value is not None):
                value = scale * (known[-1] if largest else known[len(known) // 2])
                if not value and unit == "GB":
                    continue  # nothing is moved where the roles share the weights
                note = "largest" if largest else "median of the steps"
                found.append(fact(label.format(what(match)), with_unit(value, unit), note))
    return found


def what(match: re.Match[str]) -> str:
    """The phase or role that a metric's name ends with."""
    return match[1] if match.groups() else ""


def with_unit(value: float, unit: str) -> str:
    """`0.392 s`, `17.7 ms`, `20,674 tokens/s`."""
    if unit in SMALLER and 0 < value < LEAST:
        value, unit = 1e3 * value, SMALLER[unit]
    return f"{value:,.0f} {unit}" if value >= 1000 else f"{value:.3g} {unit}"
