"""The process that scores: user code runs here, where it may hang or die alone.

A rank starts it through `mesh/tasks/pool.py` as a fresh Python, which imports no torch and has
nothing of the rank's but stdout, stderr and three descriptors:

    talk    a socket: jobs come in, outcomes go out, so that what user code prints spoils nothing
    life    a socket to the keeper: it closes when the rank ends, however that happens
    stacks  a file that receives the Python stack of a crash or a hang

It forks at once. The child makes the task and scores. Its parent, the keeper, runs no user code: it
can always see that the rank or the child has ended, and then ends all that user code has started,
also what has left the process group (as a child subreaper it inherits every orphan).
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

from mesh.tasks import load_task
from mesh.tasks.scoring import Outcome, outcome_of

KILL = b"k"  # the rank's word over `life`
GRACE_SECONDS = 2.0  # for atexit handlers, once the rank has hung up
SWEEP_SECONDS = 5.0  # a process that hangs in the kernel does not end when it is killed
STACK_SECONDS = 1.0
SET_PDEATHSIG, SET_CHILD_SUBREAPER = 1, 36  # of prctl(2)
HEADER = struct.Struct("!Q")


def main() -> None:
    """sys.argv ends with the descriptors talk, life, stacks, and the rank's process id."""
    talk, life, stacks, rank = map(int, sys.argv[-4:])
    wake, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    child = os.fork()
    if child == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for descriptor in (life, wake, wake_write):
            os.close(descriptor)
        prctl(SET_PDEATHSIG, signal.SIGKILL)
        os.setpgid(0, 0)
        with contextlib.suppress(ConnectionError):  # the rank has ended
            serve(socket.socket(fileno=talk), stacks)
        return
    os.close(talk)
    with contextlib.suppress(OSError):  # the child may have done it, and have ended
        os.setpgid(child, child)
    prctl(SET_CHILD_SUBREAPER, 1)
    Keeper(child, rank, socket.socket(fileno=life), wake, stacks).keep()
    os._exit(0)


def serve(talk: socket.socket, stacks: int) -> None:
    """Make the task, say so, and score job after job until the rank hangs up."""
    faulthandler.enable(file=stacks)
    faulthandler.register(signal.SIGUSR1, file=stacks)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    own = os.getpid()
    name, seed, args = pickle.loads(receive(talk) or b"")
    try:
        task, problem = load_task(name, seed, args), ""
    except Exception as error:  # a task's module and class are the user's code
        ours = isinstance(error, ValueError)
        task, problem = None, str(error) if ours else f"{type(error).__name__}: {error}"
    send(talk, json.dumps({"problem": problem}).encode())
    while task is not None and (job := receive(talk)) is not None:
        outcome = outcome_of(task, *pickle.loads(job))
        if os.getpid() != own:
            os._exit(0)  # user code has forked and let the copy return
        sys.stdout.flush()
        send(talk, as_json(outcome))


def as_json(outcome: Outcome) -> bytes:
    """All but the exception, which is this process's."""
    words = {"reward": outcome.reward, "problem": outcome.problem, "detail": outcome.detail}
    return json.dumps(words).encode()


def send(talk: socket.socket, content: bytes) -> None:
    talk.sendall(HEADER.pack(len(content)) + content)


def receive(talk: socket.socket) -> bytes | None:
    """The next message; None where the other side has hung up."""
    header = read(talk, HEADER.size)
    return None if header is None else read(talk, HEADER.unpack(header)[0])


def read(talk: socket.socket, size: int) -> bytes | None:
    content = bytearray()
    while len(content) < size:
        part = talk.recv(min(size - len(content), 1 << 20))
        if not part:
            return None
        content += part
    return bytes(content)


@dataclass
class Keeper:
    """Waits for the end of the child or of the rank, and leaves nothing behind."""

    child: int
    rank: int
    life: socket.socket
    wake: int
    stacks: int

    def keep(self) -> None:
        """Tells the rank how the child has ended, where the rank is still there."""
        poll, never = select.poll(), float("inf")
        give_up = never
        poll.register(self.wake, select.POLLIN)
        poll.register(self.life, select.POLLIN)
        while not self._child_has_ended():
            ready = dict(poll.poll(1000 if give_up == never else 50))
            if self.wake in ready:
                os.read(self.wake, 512)
            if self.life.fileno() in ready:
                if self._heard() == KILL:
                    self._ask_for_stack()
                    give_up = 0.0
                else:
                    give_up = min(give_up, time.monotonic() + GRACE_SECONDS)
                poll.unregister(self.life)
            elif os.getppid() != self.rank:
                give_up = min(give_up, time.monotonic() + GRACE_SECONDS)
            if time.monotonic() > give_up:
                self._kill_group()
        self._kill_group()  # before the child is reaped: until then nobody else has its number
        status = os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])
        sweep()
        with contextlib.suppress(OSError):
            self.life.sendall(str(status).encode())

    def _heard(self) -> bytes:
        """The rank's word; nothing where it has ended."""
        with contextlib.suppress(OSError):
            return self.life.recv(1)
        return b""

    def _child_has_ended(self) -> bool:
        """Reaps the orphans that have ended, but not the child."""
        while True:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None or ended.si_pid == self.child:
                return ended is not None
            os.waitpid(ended.si_pid, 0)

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child, signal.SIGKILL)

    def _ask_for_stack(self) -> None:
        """Have the child write down where it hangs: its C code does, whatever Python does."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.child, signal.SIGUSR1)
        deadline = time.monotonic() + STACK_SECONDS
        while time.monotonic() < deadline and not os.fstat(self.stacks).st_size:
            time.sleep(0.01)
        time.sleep(0.05)


def sweep() -> None:
    """End this process's children, and theirs, which are its own once their parents have ended."""
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
    """Linux's; elsewhere there is none, and the keeper has the process group alone."""
    return ctypes.CDLL(None).prctl(option, value) if sys.platform == "linux" else None
