"""How an SPMD program ends: all ranks together, soon, and with the first error as the last words.

A rank blocked in a collective cannot notice that a peer failed, and Python runs no signal handler
while C code holds the main thread. So each process has one daemon thread that never touches a
process group: it polls the rendezvous store through a client of its own, looks whether the local
peers and the launcher still live, and receives signals through a wake-up pipe. It ends the
process with `os._exit`, because tearing down NCCL or gloo after a failure can hang.

A first Ctrl-C is a request where the program asks for it (`Process.should_stop`), and has the
patience of one step: a step that lasts longer is given up before torchrun kills it. Once all ranks
know that they stop there is no limit of ours; torchrun still kills what it has signalled after
TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds. A program that never asked ends at once.

The first failure is recorded by an atomic `compare_set`. The other ranks print what they have to
say, go mute and acknowledge it; then the rank that recorded it prints it and leaves first, so
that torchrun's own summary names it too.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist

from mesh.lifecycle.ending import (
    Failure,
    alive,
    forget_signals,
    leads_group,
    mute,
    patience_seconds,
    place,
    restart_count,
    say,
    show_stack,
    under_torchrun,
    write_and_close,
    write_error_files,
)
from mesh.lifecycle.heartbeat import beats
from mesh.lifecycle.watchdog import Watchdog

POLL_SECONDS = 0.25
SETTLE_SECONDS = 0.5  # a killed peer breaks our collectives before it can be seen to be dead
MUTE_SECONDS = 6.0  # the longest wait for other ranks before the first error is printed
ECHO_SECONDS = 1.0  # launchers repeat a signal; a person presses Ctrl-C again later than this
LEAVE_SECONDS = 20.0  # the longest a clean teardown may take
SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOPPING = "stopping at the end of this step; Ctrl-C again ends at once"
LIMIT = "; torchrun kills what then still runs after TORCH_ELASTIC_SHUTDOWN_TIMEOUT (30 s if unset)"


class Guard:
    """Watches over one process. `run_dir` is where the last words say that the run lies;
    `stall_seconds`: how long the world may stand still, 0: for ever."""

    def __init__(self, rank: int, world_size: int, local_peers: list[int], stall_seconds: float):
        self.rank = rank
        self.run_dir: str | None = None
        self._peers = [r for r in range(world_size) if r != rank]
        alone = not self._peers and not under_torchrun()
        store: dist.Store = dist.HashStore() if alone else _open_store()
        self._store = dist.PrefixStore(f"mesh/{restart_count()}", store)
        self._lasting = dist.PrefixStore("mesh/all", store)
        self._local_pids = self._exchange_pids(local_peers)
        self._parent = os.getppid()
        # Whoever ends the process holds the lock for ever; it also keeps the store to one thread.
        self._lock = threading.Lock()
        self._patience = patience_seconds()
        self._polled = False
        self._obeyed = False
        self._stop_at: float | None = None
        self._leave_at: float | None = None
        self._exit_code = 0
        self._gone = threading.Event()
        self._wake, self._wake_write = os.pipe()
        self._old_wakeup, self._old_signals = self._take_signals()
        self._guarded = threading.get_ident()
        now = time.monotonic()
        self._watchdog = Watchdog(rank, world_size, self._store, stall_seconds, beats, now)
        self._thread = threading.Thread(target=self._listen, name="mesh-guard", daemon=True)
        self._thread.start()

    @property
    def stop_requested(self) -> bool:
        return self._stop_at is not None

    def remember(self, name: str, value: str) -> None:
        """Leave word for a later attempt of the same torchrun."""
        with self._lock:
            self._lasting.set(name, value)

    def recall(self, name: str) -> str | None:
        """What an earlier attempt of the same torchrun left; None: nothing."""
        with self._lock:
            return self._lasting.get(name).decode() if self._lasting.check([name]) else None

    def told(self, stop: bool) -> None:
        """All ranks have asked whether to stop, and were told this."""
        self._polled, self._obeyed = True, self._obeyed or stop

    def fail(self, error: BaseException) -> NoReturn:
        """End all ranks because of `error`, which is being handled."""
        time.sleep(SETTLE_SECONDS)
        self._lock.acquire()
        mine = Failure.of(error, self.rank)
        first = mine
        with contextlib.suppress(dist.DistError):  # no store: nobody left to agree with
            first = self._record(self._lost_peer() or mine)
        if first == mine:
            write_error_files(error, self.rank, self.run_dir)
        elif first.line != mine.line:
            say(f"rank {self.rank} failed too:\n{mine.text}")
        if first.reporter == self.rank:
            self._report(first)
        self._follow()

    def leave(self, exit_code: int = 0) -> None:
        """A clean end begins: from now on a hanging teardown is cut short with `exit_code`."""
        with self._lock:
            self._leave_at, self._exit_code = time.monotonic(), exit_code
            self._watchdog.close()
            self._announce("left")
        hosts_store = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if self._peers and hosts_store:
            self._wait_for_peers(LEAVE_SECONDS / 2)

    def close(self) -> None:
        """Stop watching and give the signals back."""
        self._gone.set()
        os.write(self._wake_write, b"\0")
        self._thread.join()
        self._watchdog.close()
        if self._old_signals:
            signal.set_wakeup_fd(self._old_wakeup)
            for number, handler in self._old_signals.items():
                signal.signal(number, handler)
        os.close(self._wake)
        os.close(self._wake_write)

    def _listen(self) -> None:
        while not self._gone.is_set():
            signalled = self._hear(POLL_SECONDS)
            with self._lock:
                again = signalled and self._stop_at is not None
                if again:  # torchrun and peers end of it too, and are not to be taken for the cause
                    self._on_signal()
                try:
                    self._check()
                except dist.DistError:
                    self._vanish("the rendezvous store is gone")
                if signalled and not again:  # torchrun signals when a peer has failed, too
                    self._on_signal()

    def _check(self) -> None:
        now = time.monotonic()
        if self._leave_at is not None:
            if now > self._leave_at + LEAVE_SECONDS:
                say(f"rank {self.rank}: teardown took over {LEAVE_SECONDS:.0f} s, cut short")
                self._die(self._exit_code)
            return
        if under_torchrun() and os.getppid() != self._parent:
            self._vanish("torchrun is gone")
        if self._stop_at is not None and not self._obeyed and now > self._stop_at + self._patience:
            self._abandon("the step did not end in time")
        if self._store.check(["first"]):
            self._end_after(Failure.from_json(self._store.get("first")))
        if lost := self._lost_peer():
            self._end_after(self._record(lost))
        if stall := self._watchdog.look(now):
            self._end_after(self._record(Failure(self.rank, self.rank, stall, stall, True)))

    def _hear(self, seconds: float) -> bool:
        """Whether a request to stop comes within so many seconds."""
        heard, _, _ = select.select([self._wake], [], [], seconds)
        return bool(heard) and bool(set(os.read(self._wake, 64)) & set(SIGNALS))

    def _on_signal(self) -> None:
        now = time.monotonic()
        if self._leave_at is not None:
            return  # a clean end has begun
        if not self._polled:
            self._abandon("ended at once")
        if self._stop_at is None:
            self._stop_at = now
            if self.rank == 0:
                say(STOPPING + (LIMIT if under_torchrun() else ""))
        elif now > self._stop_at + ECHO_SECONDS:
            self._abandon("ended at once")

    def _record(self, failure: Failure) -> Failure:
        """The first failure of the run: this one, unless another was recorded before it."""
        return Failure.from_json(self._store.compare_set("first", "", failure.to_json()))

    def _end_after(self, first: Failure) -> NoReturn:
        if first.stalled:
            show_stack(self._guarded, self.rank, self.run_dir)
        if first.reporter == self.rank:
            self._report(first)
        self._follow()

    def _report(self, first: Failure) -> NoReturn:
        """Print the first failure once every other rank is silent."""
        last_words = mute()
        self._announce("muted")
        self._wait_for_peers(MUTE_SECONDS)
        who = "all ranks ended" if first.stalled else f"rank {first.rank} failed"
        write_and_close(last_words, f"\n{who} at {first.time}:\n{first.text}\n")
        with contextlib.suppress(dist.DistError):
            self._store.set("reported", "1")
        self._die(1)

    def _follow(self) -> NoReturn:
        """Another rank reports the failure: be silent, and leave after it."""
        mute()
        self._announce("muted")
        with contextlib.suppress(dist.DistError):
            deadline = time.monotonic() + MUTE_SECONDS + 1
            while time.monotonic() < deadline and not self._store.check(["reported"]):
                time.sleep(POLL_SECONDS / 5)
        # torchrun signals us when it has seen the reporter leave.
        select.select([self._wake], [], [], 2.0)
        self._die(1)

    def _abandon(self, why: str) -> NoReturn:
        """Every rank was signalled and does this by itself, so give the slower ones a moment."""
        last_words = mute()
        self._announce("stopped")
        if self.rank == 0:
            where = f"; the run lies in {self.run_dir}" if self.run_dir else ""
            write_and_close(last_words, f"\nstopped: {why}{where}\n")
        time.sleep(2 * POLL_SECONDS)
        self._die(130)

    def _vanish(self, why: str) -> NoReturn:
        if self._hear(SETTLE_SECONDS) or self._stop_at is not None:  # it goes at a second Ctrl-C
            self._abandon("ended at once")
        write_and_close(mute(), f"\nrank {self.rank} ends: {why}\n")
        self._die(1)

    def _die(self, exit_code: int) -> NoReturn:
        if self._old_signals and leads_group():
            os.killpg(os.getpid(), signal.SIGTERM)
        os._exit(exit_code)

    def _exchange_pids(self, local_peers: list[int]) -> dict[int, int]:
        """Process ids of the peers that this process can see."""
        self._store.set(f"pid/{self.rank}", f"{place()} {os.getpid()}")
        answers = {r: self._store.get(f"pid/{r}").decode().rsplit(" ", 1) for r in local_peers}
        return {r: int(pid) for r, (where, pid) in answers.items() if where == place()}

    def _announce(self, state: str) -> None:
        with contextlib.suppress(dist.DistError):
            self._store.set(f"out/{self.rank}", state)

    def _wait_for_peers(self, seconds: float) -> None:
        """Until every living peer has left or gone mute, but no longer than this."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(dist.DistError):
            for peer in self._peers:
                while self._missing(peer) and time.monotonic() < deadline:
                    time.sleep(POLL_SECONDS / 5)

    def _missing(self, peer: int) -> bool:
        dead = peer in self._local_pids and not alive(self._local_pids[peer])
        return not dead and not self._store.check([f"out/{peer}"])

    def _lost_peer(self) -> Failure | None:
        """A failure record for a local peer that ended without a word."""
        for peer, pid in self._local_pids.items():
            if not alive(pid) and not self._store.check([f"out/{peer}"]):
                text = f"rank {peer} (process {pid}) was killed, or crashed outside Python"
                return Failure(peer, self.rank, text, text)
        return None

    def _take_signals(self) -> tuple[int, dict[int, Any]]:
        """Have C code write each signal into the pipe, whatever Python does at that time."""
        if threading.current_thread() is not threading.main_thread():
            return -1, {}  # an actor framework owns the main thread and its signals
        os.set_blocking(self._wake_write, False)
        os.register_at_fork(after_in_child=forget_signals)
        old_wakeup = signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        return old_wakeup, {s: signal.signal(s, lambda *_: None) for s in SIGNALS}


def _open_store() -> dist.Store:
    """A client of our own: one client cannot serve two threads."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=60))
