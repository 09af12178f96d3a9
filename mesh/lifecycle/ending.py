"""The means by which `guard.py` ends a process: the record of a failure, silence, last words."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from mesh.config.keys import Refusal
from mesh.lifecycle.terminal import leave_terminal

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Failure:
    """Why `rank` failed, as recorded by rank `reporter`; `line` is the last line of `text`.
    `stalled`: no rank failed, none makes progress, and each one prints its stack. `refused`: the
    user has to change something, and `text` is the message that says what."""

    rank: int
    reporter: int
    line: str
    text: str
    stalled: bool = False
    refused: bool = False
    time: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S"))

    @classmethod
    def of(cls, error: BaseException, rank: int) -> Failure:
        if isinstance(error, Refusal):
            return cls(rank, rank, str(error), str(error), refused=True)
        line = "".join(traceback.format_exception_only(error)).rstrip()
        return cls(rank, rank, line, format_error(error))

    @classmethod
    def from_json(cls, text: str | bytes) -> Failure:
        return cls(**json.loads(text))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def report(self) -> str:
        """The last thing that the run prints; a refusal is the message alone."""
        if self.refused:
            return f"{self.text}\n"
        who = "all ranks ended" if self.stalled else f"rank {self.rank} failed"
        return f"\n{who} at {self.time}:\n{self.text}\n"


def format_error(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).rstrip()


def write_error_files(error: BaseException, rank: int, run_dir: str | None) -> None:
    """Write the traceback for torchrun's summary and to `RUN_DIR/error-rankN.txt`, where they can
    be written: a full disk may be what `error` is about."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        with contextlib.suppress(OSError):
            get_error_handler().record_exception(error)
    if run_dir is not None and Path(run_dir).is_dir():
        with contextlib.suppress(OSError):
            Path(run_dir, f"error-rank{rank}.txt").write_text(format_error(error) + "\n")


def show_stack(thread: int, rank: int, run_dir: str | None) -> None:
    """Print the stack of a thread of this process, and write it to `RUN_DIR/stack-rankN.txt`."""
    frame = sys._current_frames().get(thread)
    stack = "".join(traceback.format_stack(frame)) if frame is not None else "its thread is gone\n"
    say(f"\nstack of rank {rank}:\n{stack.rstrip()}")
    if run_dir is not None and Path(run_dir).is_dir():
        with contextlib.suppress(OSError):
            Path(run_dir, f"stack-rank{rank}.txt").write_text(stack)


def mute() -> int:
    """Send stdout and stderr, C++ threads' too, nowhere. Returns the old stderr."""
    leave_terminal()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    old = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    return old


def write_and_close(descriptor: int, text: str) -> None:
    with contextlib.suppress(OSError), os.fdopen(descriptor, "w") as stream:
        stream.write(text)


def say(text: str) -> None:
    """A line on stderr in one piece: torchrun unbuffers, and `print` writes the newline alone."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def alive(pid: int) -> bool:
    """True where a process of this host runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def place() -> str:
    """Host and pid namespace, within which a process id is unique."""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {os.readlink(namespace) if namespace.exists() else ''}"


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def leads_group() -> bool:
    """True where all in this process's group are its children: torchrun and tools/monarch.py make
    each rank the leader of one. A shell does so too, for a whole pipeline."""
    return "TORCHELASTIC_RESTART_COUNT" in os.environ and os.getpgid(0) == os.getpid()


def restart_count() -> int:
    """Number of times the launcher has restarted this run."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def patience_seconds() -> float:
    """Seconds from a stop request to abandoning the step: torchrun kills after its shutdown
    timeout."""
    if not under_torchrun():
        return float("inf")
    return max(1.0, float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30)) - 5)


def take_signals(pipe: int) -> tuple[int, dict[int, Any]]:
    """Have C code write each signal into the pipe, whatever Python is doing. Returns the old
    wake-up descriptor and handlers; none off the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return -1, {}  # an actor framework owns the main thread and its signals
    os.register_at_fork(after_in_child=forget_signals)
    old_wakeup = signal.set_wakeup_fd(pipe, warn_on_full_buffer=False)
    return old_wakeup, {s: signal.signal(s, lambda *_: None) for s in SIGNALS}


def signalled_within(pipe: int, seconds: float) -> bool:
    """True where a request to stop arrives in a non-blocking pipe within so many seconds. Two
    threads may wait for it, of which one gets it: the other must not block in `read`."""
    heard, _, _ = select.select([pipe], [], [], seconds)
    try:
        asked = bool(heard) and bool(set(os.read(pipe, 64)) & set(SIGNALS))
    except BlockingIOError:
        return False
    if asked:  # the launcher and the other ranks are about to write to the terminal, too
        leave_terminal()
    return asked


def forget_signals() -> None:
    """Reset the signal handlers of a forked child: its signals are no requests to stop the run."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
