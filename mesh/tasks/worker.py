"""The scoring process: it runs a task's `score` and `reply`, which are user code, in isolation,
where a hang or a crash harms no rank.

A rank starts it through `mesh/tasks/pool.py` as a fresh Python, which does not import torch and
inherits only stdout, stderr and three descriptors:

    channel   a socket: jobs in, outcomes out, so that what user code prints does no harm
    liveness  a socket to the supervisor: it closes when the rank ends, however that happens
    stacks    a file that receives the Python stack of a crash or a hang

It forks at once. The child creates the task and calls it. Its parent, the supervisor, runs no user
code: it always notices that the rank or the child has ended, and then kills all that user code has
started, even outside the process group (as a child subreaper it inherits every orphan).
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import pickle
import select
import signal
import socket
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mesh.lifecycle.agreement import text_of
from mesh.tasks import load_task
from mesh.tasks.scoring import OUTCOMES, as_message
from mesh.tasks.told import tell_tokenizer
from mesh.tasks.weighted import with_scores

KILL = b"k"  # from the rank, over `liveness`
GRACE_SECONDS = 2.0  # for atexit handlers, after the rank has hung up
SWEEP_SECONDS = 5.0  # a process stuck in the kernel does not end when it is killed
STACK_SECONDS = 1.0
SET_PDEATHSIG, SET_CHILD_SUBREAPER = 1, 36  # of prctl(2)
HEADER = struct.Struct("!Q")


def main() -> None:
    """Run; sys.argv ends with the descriptors channel, liveness, stacks, and the rank's pid."""
    channel, liveness, stacks, rank = map(int, sys.argv[-4:])
    wake, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    child = os.fork()
    if child == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for descriptor in (liveness, wake, wake_write):
            os.close(descriptor)
        prctl(SET_PDEATHSIG, signal.SIGKILL)
        os.setpgid(0, 0)
        with contextlib.suppress(ConnectionError):  # the rank has ended
            serve(socket.socket(fileno=channel), stacks)
        return
    os.close(channel)
    with contextlib.suppress(OSError):  # the child may have done so, and have ended
        os.setpgid(child, child)
    prctl(SET_CHILD_SUBREAPER, 1)
    Supervisor(child, rank, socket.socket(fileno=liveness), wake, stacks).run()
    os._exit(0)


def serve(channel: socket.socket, stacks: int) -> None:
    """Create the task, acknowledge it, with texts of its first prompts if they are asked for, and
    do jobs until the rank hangs up.
    """
    faulthandler.enable(file=stacks)
    faulthandler.register(signal.SIGUSR1, file=stacks)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    own = os.getpid()
    name, seed, args, scores, tokenizer, num = pickle.loads(receive(channel) or b"")
    try:
        made = load_task(name, seed, args)
        tell_tokenizer(made, tokenizer)
        task, problem = with_scores(made, scores), ""
    except Exception as error:  # a task's module and class are user code
        ours = isinstance(error, ValueError)
        task, problem = None, str(error) if ours else f"{type(error).__name__}: {error}"
    drawn = first_prompts(task, num) if task is not None and num else []
    send(channel, json.dumps({"problem": problem, "drawn": drawn}).encode())
    while task is not None and (job := receive(channel)) is not None:
        method, *arguments = pickle.loads(job)
        began = time.perf_counter()
        outcome = OUTCOMES[method](task, *arguments)
        seconds = time.perf_counter() - began
        if os.getpid() != own:
            os._exit(0)  # user code has forked, and the copy has returned
        sys.stdout.flush()
        send(channel, as_message(outcome, seconds))


def first_prompts(task: Any, num: int) -> list[str]:
    """A text of each training prompt of the first step, or one of the error that there was."""
    try:
        return [text_of(prompt) for prompt in task.train_prompts(0, num)]
    except Exception as error:  # user code; the rank reports it if it happens there too
        return [f"{type(error).__name__}: {error}"]


def send(channel: socket.socket, content: bytes) -> None:
    """Send a message behind its length."""
    channel.sendall(HEADER.pack(len(content)) + content)


def receive(channel: socket.socket) -> bytes | None:
    """The next message; None if the other side has hung up."""
    header = read(channel, HEADER.size)
    return None if header is None else read(channel, HEADER.unpack(header)[0])


def read(channel: socket.socket, size: int) -> bytes | None:
    """Exactly `size` bytes; None if the other side has hung up."""
    content = bytearray()
    while len(content) < size:
        part = channel.recv(min(size - len(content), 1 << 20))
        if not part:
            return None
        content += part
    return bytes(content)


@dataclass
class Supervisor:
    """Waits for the child or the rank to end, and leaves no process behind."""

    child: int
    rank: int
    liveness: socket.socket
    wake: int
    stacks: int

    def run(self) -> None:
        """Report the child's exit status to the rank, if that still exists."""
        poll, never = select.poll(), float("inf")
        give_up = never
        poll.register(self.wake, select.POLLIN)
        poll.register(self.liveness, select.POLLIN)
        while not self._child_has_ended():
            ready = dict(poll.poll(1000 if give_up == never else 50))
            if self.wake in ready:
                os.read(self.wake, 512)
            if self.liveness.fileno() in ready:
                if self._received() == KILL:
                    self._dump_stack()
                    give_up = 0.0
                else:
                    give_up = min(give_up, time.monotonic() + GRACE_SECONDS)
                poll.unregister(self.liveness)
            elif os.getppid() != self.rank:
                give_up = min(give_up, time.monotonic() + GRACE_SECONDS)
            if time.monotonic() > give_up:
                self._kill_group()
        self._kill_group()  # before the child is reaped: until then its pid is not reused
        status = os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])
        kill_descendants()
        with contextlib.suppress(OSError):
            self.liveness.sendall(str(status).encode())

    def _received(self) -> bytes:
        """The byte that the rank sent; empty if it has ended."""
        with contextlib.suppress(OSError):
            return self.liveness.recv(1)
        return b""

    def _child_has_ended(self) -> bool:
        """True if the child has ended; reaps ended orphans, but not the child."""
        while True:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None or ended.si_pid == self.child:
                return ended is not None
            os.waitpid(ended.si_pid, 0)

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child, signal.SIGKILL)

    def _dump_stack(self) -> None:
        """Have the child dump its stack; faulthandler does so in C, even if Python hangs."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.child, signal.SIGUSR1)
        deadline = time.monotonic() + STACK_SECONDS
        while time.monotonic() < deadline and not os.fstat(self.stacks).st_size:
            time.sleep(0.01)
        time.sleep(0.05)


def kill_descendants() -> None:
    """Kill all children, and theirs, which this process inherits once their parents have ended."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    deadline = time.monotonic() + SWEEP_SECONDS
    while time.monotonic() < deadline:
        pids = children.read_text().split() if children.exists() else []
        if not pids:
            return
        for pid in map(int, pids):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.005)


def prctl(option: int, value: int) -> Any:
    """Call Linux's prctl; elsewhere do nothing: the supervisor has the process group alone."""
    return ctypes.CDLL(None).prctl(option, value) if sys.platform == "linux" else None
