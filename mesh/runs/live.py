"""Progress of a run on a terminal: a table of a few rows that is redrawn in place.

Its curves begin with the run, not with this start of it: they are read from the run's metrics.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from mesh.lifecycle.running import running_phase
from mesh.lifecycle.terminal import terminal_left
from mesh.runs.curve import ASCII_BARS, BARS, Curve, sparkline
from mesh.runs.lines import read_lines
from mesh.runs.progress import (
    EVALUATION,
    RATE_UNIT,
    REWARD,
    Metrics,
    Pace,
    PlainProgress,
    clock,
    columns,
    packed,
    plain_line,
)
from mesh.runs.screen import Screen

REFRESH_SECONDS = 0.5
BAR_WIDTH = 12
PHASE_WIDTH = len("checkpoint 0:00")
CURVES = {"reward": REWARD, "loss": "loss", "eval": EVALUATION}
MOST_BARS = 30  # of a curve
TWO_CURVES = 60  # the narrowest row that has two of them
ABOVE = ("reward", "loss", "eval", "length", "entropy", "truncated")
OF_THE_HEAD = ("reward", "loss", "eval", "ETA")  # what has no cell of its own in the rows of values


class LiveProgress:
    """The table of one run, in a thread that redraws it; the run directory and steps with an
    evaluation are printed above it."""

    def __init__(self, pace: Pace, run_dir: Path, console: Console):
        self._pace, self._run_dir = pace, run_dir
        self._metrics: Metrics = {}
        self._curves = {label: Curve() for label in CURVES}
        log = run_dir / "metrics.jsonl"
        for line in read_lines(log, killed=True) if log.exists() else []:
            self._see(line)
        self._bars = ASCII_BARS if console.options.ascii_only else BARS
        self._sizes: dict[str, int] = {}
        self._screen, self._closed = Screen(console), threading.Event()
        self._screen.open()
        self._screen.print(f"run {run_dir}")
        self._thread = threading.Thread(target=self._redraw, name="mesh-progress", daemon=True)
        self._thread.start()

    def update(self, metrics: Metrics, evaluated: bool) -> None:
        """Show the metrics of the step that `pace` has come to."""
        with self._screen.lock:
            self._metrics = metrics
            self._see(metrics if evaluated else without(metrics, EVALUATION))
        if terminal_left():
            self._screen.print(plain_line(metrics, self._pace))
        elif evaluated:
            self._screen.print(self._line_above())

    def close(self) -> None:
        """Leave the last state of the table on the terminal."""
        self._closed.set()
        self._thread.join()
        self._screen.draw(self._rows())
        self._screen.close()

    def _redraw(self) -> None:
        while not self._closed.wait(REFRESH_SECONDS):
            try:
                self._screen.draw(self._rows())
            except OSError:
                return  # the terminal is gone, which is no reason to end the run

    def _see(self, metrics: Metrics) -> None:
        for label, key in CURVES.items():
            if metrics.get(key) is not None:
                self._curves[label].add(metrics[key])

    def _line_above(self) -> str:
        """One row: the step and what was evaluated, as much of it as there is room for."""
        shown = columns(self._metrics, self._pace)
        texts = [f"step {self._pace.step:4}/{self._pace.steps}"]
        texts += [f"{label} {shown[label]}" for label in ABOVE if label in shown]
        texts.append(f"elapsed {self._elapsed()}")
        fitting = packed([len(text) for text in texts], self._screen.width)[0]
        return "  ".join(texts[i] for i in fitting)

    def _rows(self) -> list[Text]:
        """Those of the table: where the run is, its curves, its values, its directory."""
        with self._screen.lock:
            shown, width = columns(self._metrics, self._pace), self._screen.width
            speed = [cell(k, v) for k, v in shown.items() if k == "pace" or v.endswith(RATE_UNIT)]
            values = [cell(k, v) for k, v in shown.items() if k not in OF_THE_HEAD]
            values = [one for one in values if one not in speed]
            groups = [self._head(shown), self._curve_cells(width), values, speed]
            rows = [row for cells in groups for row in self._packed(cells, width)]
            return [*rows, cell("run", shortened(str(self._run_dir), width - len("run ")))]

    def _packed(self, cells: Sequence[Text], width: int) -> list[Text]:
        """Rows of cells, each as wide as its kind has ever been: so that none moves."""
        for one in cells:
            name = one.plain.partition(" ")[0]
            one.pad_right(max(0, self._sizes.get(name, 0) - one.cell_len))
            self._sizes[name] = one.cell_len
        rows = packed([one.cell_len for one in cells], width)
        return [Text("  ").join(cells[i] for i in row) for row in rows]

    def _head(self, shown: dict[str, str]) -> list[Text]:
        pace, phase = self._pace, running_phase()
        text = f"{phase[0]} {clock(time.monotonic() - phase[1])}" if phase else ""
        done = round(BAR_WIDTH * min(1, pace.step / max(pace.steps, 1)))
        full, rest = ("#", "-") if self._bars == ASCII_BARS else ("━", "─")
        return [
            cell("step", f"{pace.step:4}/{pace.steps}"),
            Text.assemble((full * done, "green"), (rest * (BAR_WIDTH - done), "dim")),
            cell("elapsed", self._elapsed()),
            cell("ETA", shown["ETA"]),
            Text(text.ljust(PHASE_WIDTH), "cyan"),
        ]

    def _curve_cells(self, width: int) -> list[Text]:
        """Each with the first and the last value of the whole run."""
        room = (width - 2) // 2 if width >= TWO_CURVES else width
        found: list[Text] = []
        for label, curve in self._curves.items():
            if curve.first is None or curve.last is None or (label == "loss" and found):
                continue
            first, last = f"{curve.first:.3f} ", f" {curve.last:.3f}"
            bars = min(MOST_BARS, room - len(f"{label} {first}{last}"))
            drawn = sparkline(curve.means(), max(1, bars), self._bars)
            found.append(cell(label, first).append(drawn, "green").append(last))
        return found

    def _elapsed(self) -> str:
        return clock(self._pace.now() - self._pace.began)


def cell(label: str, value: str) -> Text:
    """A value after its label; a pace says by its unit what it is."""
    return Text(value) if label == "pace" else Text.assemble((f"{label} ", "dim"), value)


def shortened(text: str, width: int) -> str:
    """The end of a text that is too long, after an ellipsis."""
    return text if len(text) <= width else "..." + text[max(0, len(text) - width + 3) :]


def without(metrics: Metrics, key: str) -> Metrics:
    return {name: value for name, value in metrics.items() if name != key}


def open_progress(pace: Pace, run_dir: Path, wanted: bool) -> PlainProgress | LiveProgress:
    """The live table where it is wanted and stdout is a terminal that can redraw.

    A pipe is none, whatever FORCE_COLOR says of colours.
    """
    console = Console(file=sys.stdout)
    if wanted and sys.stdout.isatty() and console.is_terminal and not console.is_dumb_terminal:
        return LiveProgress(pace, run_dir, console)
    return PlainProgress(pace, run_dir)
