"""A terminal: the rows of text that a program leaves on it, and a program that runs on one."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping, Sequence

PIECE = re.compile(r"\x1b\[(\??)([\d;]*)([A-Za-z])|[^\x1b]", re.S)


class Terminal:
    """Rows of text with a cursor: wrapping, scrolling, and the escape sequences of a table that is
    redrawn. Any other sequence is an AssertionError."""

    def __init__(self, width: int, height: int = 24):
        self.width, self.height = width, height
        self.lines = [""]  # from the first one that was written
        self.row, self.column = 0, 0
        self.cursor_shown = True
        self._unread = ""

    def feed(self, text: str) -> None:
        text, place = self._unread + text, 0
        while match := PIECE.match(text, place):
            if match[3]:
                self._obey(match[1], match[2], match[3])
            else:
                self._put(match[0])
            place = match.end()
        self._unread = text[place:]

    @property
    def rows(self) -> list[str]:
        return [line.rstrip() for line in self.lines]

    def _obey(self, private: str, number: str, letter: str) -> None:
        if private:
            assert number == "25", f"unknown mode {number}"
            self.cursor_shown = letter == "h"
        elif letter == "A":
            self.row = max(self.row - int(number or 1), len(self.lines) - self.height, 0)
        elif letter in "KJ":
            assert number in ("", "0"), f"unknown erasure {number}{letter}"
            self.lines[self.row] = self.lines[self.row][: self.column]
            if letter == "J":
                self.lines[self.row + 1 :] = [""] * (len(self.lines) - self.row - 1)
        else:
            assert letter == "m", f"unknown sequence {number}{letter}"

    def _put(self, character: str) -> None:
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self.row += 1
            self.lines += [""] * (self.row + 1 - len(self.lines))
        else:
            assert character >= " ", repr(character)
            if self.column == self.width:
                self._put("\r")
                self._put("\n")
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
            self.column += 1


class OnTerminal:
    """A program as the foreground job of a pseudo-terminal, whose keyboard is ours."""

    def __init__(
        self, words: Sequence[str], env: Mapping[str, str], width: int = 80, height: int = 24
    ):
        self.screen, self.raw = Terminal(width, height), b""
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self.keyboard, theirs = pty.openpty()
        size = struct.pack("HHHH", height, width, 0, 0)
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
        self.popen = subprocess.Popen(
            words,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, **env},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        self.settings = termios.tcgetattr(self.keyboard)
        os.close(theirs)

    def wait_for(self, condition: Callable[[list[str]], bool], seconds: float = 120) -> None:
        """Read until the condition holds of the rows."""
        deadline = time.monotonic() + seconds
        while not condition(self.screen.rows):
            if time.monotonic() > deadline or not self._read(0.1):
                self.kill()
                raise AssertionError("\n".join(self.screen.rows))

    def press(self, key: str) -> None:
        os.write(self.keyboard, key.encode())

    def finish(self, seconds: float = 60) -> int:
        """Read to the end; the program's exit status."""
        deadline = time.monotonic() + seconds
        while self._read(0.1):
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError("\n".join(self.screen.rows))
        return self.popen.wait(timeout=seconds)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()

    def _read(self, seconds: float) -> bool:
        """Take in what has been written; False where all who could write have gone."""
        if select.select([self.keyboard], [], [], seconds)[0]:
            try:
                data = os.read(self.keyboard, 65536)
            except OSError:  # what Linux says when the other end is closed
                return False
            self.raw += data
            self.screen.feed(self._decode(data))
        return True
