"""How `guard.py` ends a process: the record of a failure, silence, the last message."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import get_error_handler


@dataclass(frozen=True)
class Failure:
    """Why `rank` failed, as recorded by rank `reporter`; `line` is the last line of `text`.
    `stalled`: no rank did, they have all come to a stop; each one shows where."""

    rank: int
    reporter: int
    line: str
    text: str
    stalled: bool = False
    time: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S"))

    @classmethod
    def of(cls, error: BaseException, rank: int) -> Failure:
        line = "".join(traceback.format_exception_only(error)).rstrip()
        return cls(rank, rank, line, format_error(error))

    @classmethod
    def from_json(cls, text: str | bytes) -> Failure:
        return cls(**json.loads(text))

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def format_error(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).rstrip()


def write_error_files(error: BaseException, rank: int, run_dir: str | None) -> None:
    """The traceback for torchrun's summary and for `RUN_DIR/error-rankN.txt`, where they can be
    written: a full disk may be what `error` is about."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        with contextlib.suppress(OSError):
            get_error_handler().record_exception(error)
    if run_dir is not None and Path(run_dir).is_dir():
        with contextlib.suppress(OSError):
            Path(run_dir, f"error-rank{rank}.txt").write_text(format_error(error) + "\n")


def show_stack(thread: int, rank: int, run_dir: str | None) -> None:
    """Where a thread of this process stands: on stderr, and in `RUN_DIR/stack-rankN.txt`."""
    frame = sys._current_frames().get(thread)
    stack = "".join(traceback.format_stack(frame)) if frame is not None else "its thread is gone\n"
    say(f"\nrank {rank} stands here:\n{stack.rstrip()}")
    if run_dir is not None and Path(run_dir).is_dir():
        with contextlib.suppress(OSError):
            Path(run_dir, f"stack-rank{rank}.txt").write_text(stack)


def mute() -> int:
    """Send stdout and stderr, C++ threads' too, nowhere. Returns the old stderr."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    old = os.dup(2)
    if os.isatty(old):
        os.write(old, b"\x1b[?25h")  # a live display hides the cursor
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
    """Whether a process of this host runs; a zombie does not."""
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
    """Where a process id means the same: host and pid namespace."""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {os.readlink(namespace) if namespace.exists() else ''}"


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def leads_group() -> bool:
    """Whether all in this process's group are its children: torchrun and tools/monarch.py make each
    rank the leader of one. A shell does so too, for a whole pipeline."""
    return "TORCHELASTIC_RESTART_COUNT" in os.environ and os.getpgid(0) == os.getpid()


def restart_count() -> int:
    """How often the launcher has started this run anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def patience_seconds() -> float:
    """From a stop request to giving the step up: torchrun kills after its shutdown timeout."""
    if not under_torchrun():
        return float("inf")
    return max(1.0, float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30)) - 5)


def forget_signals() -> None:
    """In a forked child: signals are its own, not requests to stop the run."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
