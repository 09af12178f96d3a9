"""The learning curve of a run as an SVG that is legible on light and dark pages.

The description inside the picture names the commit, the number of ranks and the digest of the final
weights, so that a curve can be traced to its run. The first named part of the scores of held-out
answers (`eval/reward/NAME`) is drawn too, where there is one. Left out: other metrics, which the
report has, several runs in one picture, smoothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

from tools.report.reading import Run
from tools.report.thinning import number

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 48, 16, 16, 40  # margins around the plot
TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)
STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #57606a }
  .grid { stroke: #d0d7de }
  .line { fill: none; stroke-width: 2; stroke-linejoin: round }
  .reward { stroke: #8c959f; stroke-width: 1.2 }
  .sampled { stroke: #0969da }
  .greedy { stroke: #1a7f37; stroke-dasharray: 6 4 }
  .part { stroke: #bc4c00; stroke-dasharray: 2 3 }
  @media (prefers-color-scheme: dark) {
    text { fill: #b1bac4 }
    .grid { stroke: #373e47 }
    .reward { stroke: #768390 }
    .sampled { stroke: #539bf5 }
    .greedy { stroke: #57ab5a }
    .part { stroke: #e0823d }
  }
"""


@dataclass(frozen=True)
class Series:
    """One line of the picture: a metric of `metrics.jsonl`, its CSS class and its legend."""

    metric: str
    css: str
    label: str


SERIES = (
    Series("reward/mean", "reward", "training reward"),
    Series("eval/accuracy", "sampled", "held-out accuracy, sampled"),
    Series("eval/accuracy_greedy", "greedy", "held-out accuracy, greedy"),
)
PART = "eval/reward/"


def learning_curve(run: Run) -> str:
    """The SVG of a run. Raises ValueError where no step was logged."""
    return picture(run.metrics, origin(run))


def origin(run: Run) -> str:
    """Where a run comes from: the words of its command, its ranks and its commit."""
    environment = run.environments[0] if run.environments else {}
    words = str(environment.get("command", "")).split()
    conf = next((word for word in words if word.startswith("conf=")), "conf unknown")
    ranks, commit = (environment.get(name, "unknown") for name in ("world_size", "git"))
    return f"{conf}, {ranks} ranks, commit {commit}"


def picture(metrics: Sequence[dict[str, Any]], source: str) -> str:
    """The SVG of a run's metrics. Raises ValueError where no step was logged."""
    last = max((line["step"] for line in metrics), default=0)
    if not last:
        raise ValueError("metrics.jsonl holds no step; let the run take one first")
    digest = metrics[-1].get("digest/weights", "unknown")
    series = (*SERIES, *parts(metrics))
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        "<title>Learning curve: reward and held-out accuracy over optimizer steps</title>",
        f"<desc>{escape(source)}; {last} steps, digest/weights {digest}</desc>",
        f"<style>{STYLE}</style>",
        *axes(last),
        *(line(one, points(metrics, one.metric, last)) for one in series),
        *legend(series),
        "</svg>\n",
    ])  # fmt: skip


def parts(metrics: Sequence[dict[str, Any]]) -> list[Series]:
    """The first named part of the held-out answers' scores, if they have any."""
    names = dict.fromkeys(name for entry in metrics for name in entry if name.startswith(PART))
    return [Series(name, "part", f"held-out {name.removeprefix(PART)}") for name in [*names][:1]]


def points(metrics: Sequence[dict[str, Any]], metric: str, last: int) -> list[tuple[float, float]]:
    """Pixel positions of the steps that logged `metric`; a null (not finite) is a gap."""
    logged = [(entry["step"], number(entry.get(metric))) for entry in metrics]
    return [position(step, value, last) for step, value in logged if value is not None]


def position(step: float, value: float, last: int) -> tuple[float, float]:
    """Pixels of a step (0 to `last`) and a value (0 to 1)."""
    x = LEFT + (WIDTH - LEFT - RIGHT) * step / last
    y = TOP + (HEIGHT - TOP - BOTTOM) * (1 - value)
    return round(x, 1), round(y, 1)


def axes(last: int) -> Iterator[str]:
    """Horizontal grid lines with their values, and the steps below."""
    for value in TICKS:
        x, y = position(0, value, last)
        yield f'<path class="grid" d="M{x} {y}H{WIDTH - RIGHT}"/>'
        yield f'<text x="{x - 8}" y="{y + 4}" text-anchor="end">{value:g}</text>'
    for step in dict.fromkeys(round(last * part / 5) for part in range(6)):
        x, y = position(step, 0, last)
        yield f'<text x="{x}" y="{y + 20}" text-anchor="middle">{step}</text>'
    x, y = position(last / 2, 0, last)
    yield f'<text x="{x}" y="{y + 36}" text-anchor="middle">optimizer step</text>'


def line(series: Series, pixels: Sequence[tuple[float, float]]) -> str:
    """A series as one polyline."""
    listed = " ".join(f"{x:g},{y:g}" for x, y in pixels)
    return f'<polyline class="line {series.css}" points="{listed}"/>'


def legend(listed: Sequence[Series]) -> Iterator[str]:
    """Lines and labels in the lower right corner, which a run that learns leaves free."""
    x = WIDTH - 240
    for row, series in enumerate(listed):
        y = HEIGHT - BOTTOM - 12 - 19 * (len(listed) - 1 - row)
        yield f'<path class="line {series.css}" d="M{x} {y}h28"/>'
        yield f'<text x="{x + 36}" y="{y + 4}">{escape(series.label)}</text>'
