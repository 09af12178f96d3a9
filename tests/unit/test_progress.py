"""The table of a run on a terminal: its rows at any width, what is printed beside it, its ends."""

from __future__ import annotations

import io
import json
import math
import sys
import threading
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text
from terminal import Terminal

from mesh.lifecycle.running import running, running_phase
from mesh.lifecycle.terminal import leave_terminal, take_terminal
from mesh.runs import live
from mesh.runs.curve import ASCII_BARS, MOST_BLOCKS, Curve, resampled, sparkline
from mesh.runs.live import LiveProgress, open_progress, shortened
from mesh.runs.progress import Pace, PlainProgress
from mesh.runs.screen import Screen

RUN_DIR = Path("runs/qwen3_tiny-20260101-000000")
METRICS = {
    "reward/mean": 0.5312,
    "response_length/mean": 5.06,
    "response/truncated": 0.0078,
    "entropy": 1.2534,
    "eval/accuracy": 0.48,
    "logprob_diff/max": 8.6e-06,
    "tokens_per_second/generate": 12345.0,
    "tokens_per_second/train": 45600.0,
    "loss": 1.0,
}


class Tty(io.StringIO):
    """A stream of a terminal, which keeps each write and what the terminal shows after it."""

    def __init__(self, width: int = 80, height: int = 24, encoding: str = "utf-8"):
        super().__init__()
        self.terminal, self.writes, self._encoding = Terminal(width, height), [], encoding

    @property
    def encoding(self) -> str:
        return self._encoding

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.terminal.feed(text.replace("\n", "\r\n"))
        if text:
            self.writes.append((text, self.terminal.column, self.terminal.rows[self.terminal.row]))
        return len(text)


@pytest.fixture
def tty(monkeypatch):
    """Makes stdout and stderr one terminal of a size."""

    def make(width: int = 80, **options) -> Tty:
        stream = Tty(width, **options)
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    yield make
    take_terminal()


def console(stream: Tty) -> Console:
    size = {"width": stream.terminal.width, "height": stream.terminal.height}
    return Console(file=stream, force_terminal=True, color_system="standard", **size)


def fake_pace(step: int = 12) -> Pace:
    """0.82 s a step; 9 s after its beginning."""
    clock = {"now": 0.0}
    pace = Pace(150, now=lambda: clock["now"])
    for done in range(1, step + 1):
        clock["now"] = 0.82 * done
        pace.advance(done)
    return pace


def shown(stream: Tty, run_dir: Path = RUN_DIR) -> list[str]:
    """What the terminal has at the end of a run that evaluates every second step."""
    progress = LiveProgress(fake_pace(), run_dir, console(stream))
    for i in range(8):
        metrics = METRICS | {"reward/mean": i / 8, "eval/accuracy": i / 16}
        progress.update(metrics, evaluated=i % 2 == 0)
    progress.close()
    return stream.terminal.rows


def test_the_table_on_80_columns(tty):
    assert shown(tty()) == [
        f"run {RUN_DIR}",
        *(
            f"step   12/150  reward {i / 8:.3f}  eval {i / 16:.3f}  length 5.1  entropy 1.253  "
            "truncated 1%"
            for i in (0, 2, 4, 6)
        ),
        "step   12/150  ━───────────  elapsed 0:10  ETA 1:53",
        "reward 0.000 ▁▂▃▄▅▆▇█ 0.875  eval 0.000 ▁▃▆█ 0.375",
        "length 5.1  truncated 1%  entropy 1.253  logprob_diff 8.6e-06",
        "gen 12.3k tok/s  train 45.6k tok/s  0.82 s/step",
        f"run {RUN_DIR}",
        "",
    ]


@pytest.mark.parametrize(("width", "rows"), [(200, 5), (140, 5), (80, 5), (60, 7), (40, 9)])
def test_nothing_is_cut_or_broken_at_any_width(tty, width, rows):
    found = shown(tty(width))
    above = [line for line in found if line.startswith("step") and "reward" in line]
    assert found[0] == f"run {RUN_DIR}"
    assert len(above) == 4 and found[1:5] == above
    table = found[5:-1]
    assert len(table) == rows and found[-1] == ""
    assert all(len(line) <= width for line in found)
    text = "  ".join(table)
    for unit in (
        *("step   12/150", "elapsed 0:10", "ETA 1:53", "length 5.1", "truncated 1%"),
        *("entropy 1.253", "logprob_diff 8.6e-06", "gen 12.3k tok/s", "train 45.6k tok/s"),
        *("0.82 s/step", f"run {RUN_DIR}", "reward 0.000 ", " 0.875", "eval 0.000 ", " 0.375"),
    ):
        assert unit in text, text


def test_every_write_leaves_the_terminal_whole(tty):
    stream = tty()
    progress = LiveProgress(fake_pace(), RUN_DIR, console(stream))
    progress.update(METRICS, evaluated=True)
    progress._screen.draw(progress._rows())
    print("a line")
    progress.close()
    assert len(stream.writes) == 5
    for text, column, row in stream.writes:
        assert (column, row) == (0, "")
        assert "\x1b[?25l" not in text
    assert sys.stdout is stream and sys.stderr is stream


def test_lines_that_are_printed_go_above_the_table_and_no_cell_moves(tty):
    stream = tty()
    progress = LiveProgress(fake_pace(), RUN_DIR, console(stream))
    progress.update(METRICS | {"response_length/mean": 1234.5}, evaluated=False)
    progress._screen.draw(progress._rows())
    before = next(row for row in stream.terminal.rows if row.startswith("length"))
    print("one", end=" ")
    print("line")
    print("x" * 200, file=sys.stderr)
    sys.stdout.write("unfinished")
    progress.update(METRICS, evaluated=False)
    progress.close()
    rows = stream.terminal.rows
    assert rows[:4] == [f"run {RUN_DIR}", "one line", "x" * 80, "x" * 80]
    assert rows[4:6] == ["x" * 40, "unfinished"]
    assert [row.split()[0] for row in rows[6:-1]] == ["step", "reward", "length", "gen", "run"]
    assert rows[-1] == ""
    after = next(row for row in rows if row.startswith("length"))
    assert after.index("truncated") == before.index("truncated")


def test_the_curves_of_a_resumed_run_begin_with_the_run(tty, tmp_path):
    lines = [{"step": 0, "eval/accuracy": 0.25}]
    lines += [{"step": i, "reward/mean": 0.5 if i % 2 else None} for i in range(1, 10)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 10, "rew')
    stream = tty()
    progress = LiveProgress(fake_pace(), tmp_path, console(stream))
    progress.update(METRICS | {"reward/mean": 0.9, "eval/accuracy": 0.25}, evaluated=False)
    progress.close()
    row = next(row for row in stream.terminal.rows if row.startswith("reward"))
    assert row == "reward 0.500 ▁▁▁▁▁█ 0.900  eval 0.250 ▅ 0.250"


def test_the_running_phase_is_shown_with_its_seconds(tty, monkeypatch):
    stream = tty()
    progress = LiveProgress(fake_pace(), RUN_DIR, console(stream))
    with running("train"):
        with running("generate"):
            _, since = running_phase()
            monkeypatch.setattr("time.monotonic", lambda: since + 65)
            progress._screen.draw(progress._rows())
            assert "ETA 1:53  generate 1:05" in stream.terminal.rows[1]
        progress._screen.draw(progress._rows())
        assert "ETA 1:53  train 1:05" in stream.terminal.rows[1]
    assert running_phase() is None
    progress.close()
    assert "train" not in stream.terminal.rows[1]


def test_a_terminal_that_is_left_gets_lines_below_the_table(tty):
    stream = tty()
    progress = LiveProgress(fake_pace(), RUN_DIR, console(stream))
    progress.update(METRICS, evaluated=False)
    progress._screen.draw(progress._rows())
    table = stream.terminal.rows[:-1]
    leave_terminal()
    stream.terminal.feed("^C")  # as a terminal echoes the key
    print("stopping")
    progress.update(METRICS | {"reward/mean": 0.75}, evaluated=True)
    progress.close()
    rows = stream.terminal.rows
    assert rows[: len(table) + 1] == [*table, "stopping"]
    assert rows[len(table) + 1].startswith("step   12/150  reward 0.750  length 5.1  truncated 1%")
    assert "".join(rows[len(table) + 1 :]).endswith("0.82 s/step  ETA 1:53") and rows[-1] == ""


def test_rows_that_a_narrower_terminal_has_wrapped_are_drawn_over(tty):
    stream = tty()
    screen = console(stream)
    progress = LiveProgress(fake_pace(), RUN_DIR, screen)
    progress.update(METRICS, evaluated=False)
    progress._screen.draw(progress._rows())
    wide = [line for line in stream.terminal.rows if len(line) > 50]
    screen.width = stream.terminal.width = 50
    wrapped = [line[i : i + 50] for line in stream.terminal.lines for i in (0, 50) if line[i:]]
    stream.terminal.lines = [*wrapped, ""]
    stream.terminal.row = len(wrapped)
    progress.close()
    assert wide
    begins = [row.split()[0] for row in stream.terminal.rows if row]
    assert [begins.count(word) for word in ("run", "step", "reward")] == [2, 1, 1], begins
    assert all(len(row) <= 50 for row in stream.terminal.rows)


def test_a_low_terminal_shows_the_first_rows(tty):
    stream = tty(height=4)
    rows = shown(stream)
    assert [row.split()[0] for row in rows[-4:-1]] == ["step", "reward", "length"]


def test_a_row_that_is_wider_than_the_terminal_is_cut(tty):
    stream = tty(width=30)
    screen = Screen(console(stream))
    for _ in range(2):
        screen.draw([Text("0123456789" * 5), Text("narrow")])
    assert stream.terminal.rows == ["0123456789" * 3, "narrow", ""]


def test_a_terminal_that_is_gone_ends_the_drawing_alone(tty, monkeypatch):
    failures: list[object] = []
    monkeypatch.setattr(threading, "excepthook", failures.append)
    monkeypatch.setattr(live, "REFRESH_SECONDS", 0.01)
    stream = tty()
    write = stream.write
    progress = LiveProgress(fake_pace(), RUN_DIR, console(stream))

    def gone(text: str) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(stream, "write", gone)
    progress._thread.join(10)
    assert not progress._thread.is_alive() and failures == []
    monkeypatch.setattr(stream, "write", write)
    progress.close()


def test_a_terminal_without_unicode(tty):
    text = "\n".join(shown(tty(encoding="ascii")))
    assert text.isascii()
    assert "reward 0.000 _.-:=+*# 0.875" in text and " #----------- " in text


def test_where_the_table_is_shown(tty, monkeypatch, capsys):
    def kind(wanted: bool = True) -> type:
        progress = open_progress(fake_pace(), RUN_DIR, wanted)
        progress.close()
        return type(progress)

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert kind() is PlainProgress  # capsys is no terminal
    tty()
    assert kind() is LiveProgress
    assert kind(wanted=False) is PlainProgress
    monkeypatch.setenv("TERM", "dumb")
    assert kind() is PlainProgress
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("FORCE_COLOR")
    monkeypatch.setenv("NO_COLOR", "1")
    stream = tty()
    assert kind() is LiveProgress
    assert "\x1b[32m" not in "".join(text for text, _, _ in stream.writes)


def test_a_curve_of_any_length_is_bounded_and_keeps_its_ends():
    curve = Curve()
    values = [math.sin(i / 300) + i / 5000 for i in range(5 * MOST_BLOCKS + 3)]
    for value in values:
        curve.add(value)
    curve.add(math.nan)
    means = curve.means()
    assert MOST_BLOCKS / 2 < len(means) <= MOST_BLOCKS
    span = 8  # 5 * 256 values in at most 256 blocks
    expected = [values[i : i + span] for i in range(0, len(values), span)]
    assert means == pytest.approx([sum(one) / len(one) for one in expected])
    assert (curve.first, curve.last) == (values[0], values[-1])


def test_sparklines():
    assert sparkline([], 5) == ""
    assert sparkline([3.0, 3.0], 5) == "▅▅"
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 1, 10, 11], 2) == "▁█"
    assert sparkline([1, 0], 2, ASCII_BARS) == "#_"
    assert resampled([1, 2, 3, 4, 5], 2) == [1.5, 4.0]


def test_a_long_path_keeps_its_end():
    assert shortened("runs/a", 6) == "runs/a"
    assert shortened("/home/user/runs/a", 9) == "...runs/a"
