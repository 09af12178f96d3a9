"""The last rows of a terminal, redrawn in place; what this process prints goes above them.

A frame is written in one piece and leaves the cursor, which is never hidden, on the empty line
below the rows. So whatever ends the process, and whenever, the terminal is whole: its last rows
stay, and the next line of text begins below them. Once the terminal is left to others
(`mesh/lifecycle/terminal.py`) nothing is drawn over any more.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any, TextIO, cast

from rich.console import Console
from rich.text import Text

from mesh.lifecycle.terminal import take_terminal, terminal_left

TO_LINE_END = "\x1b[K"
BELOW = "\x1b[J"


class Screen:
    """Owns the last rows of a console's terminal, and stdout and stderr while it is open."""

    def __init__(self, console: Console):
        self._console, self.lock = console, threading.RLock()
        self._shown: list[str] = []
        self._widths: list[int] = []  # of the rows that are shown [cells]
        self._left = False
        self._replaced: dict[str, Any] = {}
        take_terminal()

    @property
    def width(self) -> int:
        return self._console.width

    def open(self) -> None:
        """Have stdout and stderr printed above the rows, each where it is this terminal's."""
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream.isatty():
                self._replaced[name] = stream
                setattr(sys, name, cast(TextIO, Above(self, stream)))
        os.register_at_fork(after_in_child=self._restore_streams)

    def draw(self, rows: Sequence[Text]) -> None:
        """Put these rows in the place of those that are shown."""
        with self.lock:
            if self._is_left():
                return
            back = self._to_first_row()
            rows = rows[: max(1, self._console.height - 1)]
            for row in rows:
                row.truncate(self.width, overflow="crop")
            self._shown = [self._styled(row) for row in rows]
            self._widths = [row.cell_len for row in rows]
            self._write(back + self._frame())

    def print(self, text: str) -> None:
        """Print whole lines above the rows; once the terminal is left, below them."""
        with self.lock:
            if self._is_left():
                self._write(text + "\n")
            else:
                self._write(f"{self._to_first_row()}{BELOW}{text}\n{self._frame()}")

    def close(self) -> None:
        """Leave the rows on the terminal and what is printed to its streams."""
        with self.lock:
            for name in self._replaced:
                getattr(sys, name).finish()
            self._restore_streams()

    def _is_left(self) -> bool:
        """True once nothing is drawn any more. The first time, clears the line below the rows of
        the ^C that a terminal shows where the cursor is."""
        if terminal_left() and not self._left:
            self._left = True
            self._write(f"\r{TO_LINE_END}")
        return self._left

    def _to_first_row(self) -> str:
        """From the line below the rows to their beginning; a terminal that has become narrower has
        wrapped them."""
        up = sum(max(1, -(-width // self.width)) for width in self._widths)
        return f"\r\x1b[{up}A" if up else "\r"

    def _frame(self) -> str:
        return "".join(f"{row}{TO_LINE_END}\n" for row in self._shown) + BELOW

    def _styled(self, row: Text) -> str:
        with self._console.capture() as captured:
            self._console.print(row, end="", soft_wrap=True, highlight=False)
        return captured.get()

    def _write(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()

    def _restore_streams(self) -> None:
        for name, stream in self._replaced.items():
            setattr(sys, name, stream)


class Above(io.TextIOBase):
    """A stream whose lines are printed above the rows of a screen, each when it is complete."""

    def __init__(self, screen: Screen, stream: TextIO):
        self._screen, self._stream, self._begun = screen, stream, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._screen.lock:
            lines, newline, self._begun = (self._begun + text).rpartition("\n")
            if newline:
                self._screen.print(lines)
        return len(text)

    def finish(self) -> None:
        """Print a line that has only begun."""
        if self._begun:
            self.write("\n")

    def flush(self) -> None:
        with contextlib.suppress(ValueError):
            self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()
