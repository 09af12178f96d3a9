"""The end of an SPMD program: all ranks together, within seconds, and the first error printed last.

A rank blocked in a collective cannot notice that a peer failed, and Python runs no signal handler
while C code holds the main thread. So each process has one daemon thread that never touches a
process group: it polls the rendezvous store through a client of its own, checks that the local
peers and the launcher are alive, and receives signals through a wake-up pipe. It ends the
process with `os._exit`, because tearing down NCCL or gloo after a failure can hang.

A first Ctrl-C is a request where the program asks for it (`Process.should_stop`), and waits for the
present step; a step that takes too long is abandoned before torchrun kills it. Once all ranks have
agreed to stop there is no limit of ours; torchrun still kills what it has signalled after
TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds. A program that never asked ends at once.

The first failure is recorded by an atomic `compare_set`. The others print their own errors, the
program saves what it can (`rescue`), and all but the rank that recorded the failure go mute; it
prints the failure and leaves first, so that torchrun's own summary names it too. A refusal is no
crash: its message alone is printed, once; the rank that tells the launcher of it leaves last.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import torch.distributed as dist

from mesh.lifecycle.ending import (
    Failure,
    leads_group,
    mute,
    patience_seconds,
    restart_count,
    say,
    show_stack,
    signalled_within,
    take_signals,
    under_torchrun,
    write_and_close,
    write_error_files,
)
from mesh.lifecycle.heartbeat import heartbeats
from mesh.lifecycle.meeting import Meeting
from mesh.lifecycle.peers import Peers, open_store, wait_while
from mesh.lifecycle.watchdog import Watchdog

POLL_SECONDS = 0.25
SETTLE_SECONDS = 0.5  # a killed peer breaks our collectives before it can be seen to be dead
MUTE_SECONDS = 6.0  # the longest wait for the other ranks before the first error is printed
ECHO_SECONDS = 0.1  # a wrapper repeats the terminal's signal within 1 ms; nobody presses so fast
LEAVE_SECONDS = 20.0  # the longest a clean teardown may take
REFUSED = 2  # exit status of a start that its user has to change
REFUSED_SECONDS = 10.0  # the longest wait for the other ranks of a machine to leave after a refusal
STOPPING = "stopping at the end of this step; Ctrl-C again ends at once"
LIMIT = "; torchrun kills what still runs after TORCH_ELASTIC_SHUTDOWN_TIMEOUT (30 s if unset)"


class Guard:
    """Owns the signals and the end of one process. `local_ranks`: those of this machine. `run_dir`
    is named in the last message; `stall_seconds`: the longest time without a heartbeat of any rank
    [s], 0: no limit."""

    def __init__(self, rank: int, world_size: int, local_ranks: range, stall_seconds: float):
        self.rank = rank
        self.run_dir: str | None = None
        self.rescue: Callable[[Meeting], str] | None = None
        alone = world_size == 1 and not under_torchrun()
        store: dist.Store = dist.HashStore() if alone else open_store()
        self._store = dist.PrefixStore(f"mesh/{restart_count()}", store)
        self._lasting = dist.PrefixStore("mesh/all", store)
        self._peers = Peers(rank, world_size, local_ranks, self._store)
        self._parent = os.getppid()
        # The thread that ends the process keeps the lock; it also keeps the store to one thread.
        self._lock = threading.Lock()
        self._patience = patience_seconds()
        self._polled = False
        self._obeyed = False
        self._stop_at: float | None = None
        self._leave_at: float | None = None
        self._exit_code = 0
        self._gone = threading.Event()
        self._wake, self._wake_write = os.pipe2(os.O_NONBLOCK)
        self._old_wakeup, self._old_signals = take_signals(self._wake_write)
        self._guarded = threading.get_ident()
        now = time.monotonic()
        self._watchdog = Watchdog(rank, world_size, self._store, stall_seconds, heartbeats, now)
        self._thread = threading.Thread(target=self._listen, name="mesh-guard", daemon=True)
        self._thread.start()

    @property
    def stop_requested(self) -> bool:
        return self._stop_at is not None

    def remember(self, name: str, value: str) -> None:
        """Keep a value for a later attempt of the same torchrun."""
        with self._lock:
            self._lasting.set(name, value)

    def recall(self, name: str) -> str | None:
        """The value that an earlier attempt of the same torchrun kept; None where it kept none."""
        with self._lock:
            return self._lasting.get(name).decode() if self._lasting.check([name]) else None

    def agreed(self, stop: bool) -> None:
        """Note that all ranks have asked whether to stop, and the answer."""
        self._polled, self._obeyed = True, self._obeyed or stop

    def fail(self, error: BaseException) -> NoReturn:
        """End all ranks because of `error`, which is being handled."""
        self._die(self.settle(error))

    def settle(self, error: BaseException) -> int:
        """Agree with all ranks on the failure to print, have it printed once, and return the exit
        status with which this process is to end at once."""
        time.sleep(SETTLE_SECONDS)
        self._lock.acquire()
        mine = Failure.of(error, self.rank)
        first = mine
        with contextlib.suppress(dist.DistError):  # no store: nobody left to agree with
            first = self._record(self._peers.lost() or mine)
        if first == mine and not mine.refused:
            write_error_files(error, self.rank, self.run_dir)
        elif first.line != mine.line:
            say(f"rank {self.rank} failed too:\n{mine.text}")
        return self._last_words(first)

    def save(self) -> str:
        """After a failure of the only rank: have the program save what it can; what it says."""
        with self._lock:
            return self._save()

    def _save(self) -> str:
        if self.rescue is None:
            return ""
        self._watchdog.close()
        of_all = self.rank, self._peers.world_size, dist.PrefixStore("rescue", self._store)
        try:
            return self.rescue(Meeting(*of_all, self._peers.gone, self._signalled_within))
        except Exception as error:  # of the attempt to save: the process has to end
            return f"nothing could be saved: {error!r}"

    def leave(self, exit_code: int = 0) -> None:
        """Begin a clean end: from now on a teardown that hangs is cut short with `exit_code`."""
        with self._lock:
            self._leave_at, self._exit_code = time.monotonic(), exit_code
            self._watchdog.close()
            self._peers.announce("left")
        if self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            self._peers.wait(LEAVE_SECONDS / 2)  # this process hosts the store

    def close(self) -> None:
        """Stop the thread and restore the signal handlers."""
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
            signalled = self._signalled_within(POLL_SECONDS)
            with self._lock:
                again = signalled and self._stop_at is not None
                if again:  # it ends torchrun and peers too, which must not be taken for the cause
                    self._on_signal()
                try:
                    self._check()
                except dist.DistError:
                    self._end_orphaned("the rendezvous store is gone")
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
            self._end_orphaned("torchrun is gone")
        if self._stop_at is not None and not self._obeyed and now > self._stop_at + self._patience:
            self._abandon("the step did not end in time")
        if self._store.check(["abandoned"]):
            self._abandon(self._store.get("abandoned").decode())
        if self._store.check(["first"]):
            self._end_after(Failure.from_json(self._store.get("first")))
        if lost := self._peers.lost():
            self._end_after(self._record(lost))
        if stall := self._watchdog.look(now):
            self._end_after(self._record(Failure(self.rank, self.rank, stall, stall, True)))

    def _signalled_within(self, seconds: float) -> bool:
        """True where a request to stop arrives within so many seconds."""
        return signalled_within(self._wake, seconds)

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
        self._die(self._last_words(first))

    def _last_words(self, first: Failure) -> int:
        """Save what can be saved, print the first failure if this rank reports it; exit status."""
        outlook = "" if first.refused else self._save()
        last_words = mute()
        self._peers.announce("muted")
        if first.reporter == self.rank:
            self._report(first, last_words, outlook)
        else:
            self._follow()
        if first.refused:
            return self._status_of_refusal(first)
        if first.reporter != self.rank:  # torchrun signals us when it has seen the reporter leave
            select.select([self._wake], [], [], 2.0)
        return 1

    def _report(self, first: Failure, last_words: int, outlook: str) -> None:
        """Print the first failure, and what resuming gives, once every other rank is silent."""
        self._peers.wait(MUTE_SECONDS)
        text = first.report() + (f"{outlook}\n" if outlook else "")
        write_and_close(last_words, text if self._is_news(first) else "")
        with contextlib.suppress(dist.DistError):
            self._store.set("reported", "1")

    def _follow(self) -> None:
        """Wait until another rank has reported the failure."""
        with contextlib.suppress(dist.DistError):
            wait_while(lambda: not self._store.check(["reported"]), MUTE_SECONDS + 1)

    def _is_news(self, first: Failure) -> bool:
        """False for a refusal that an earlier attempt of the same torchrun has printed."""
        if not first.refused:
            return True
        with contextlib.suppress(dist.DistError):
            known = self._lasting.check(["refused"]) and self._lasting.get("refused").decode()
            if known == first.text:
                return False
            self._lasting.set("refused", first.text)
        return True

    def _status_of_refusal(self, first: Failure) -> int:
        """0 where another rank's status tells the launcher, which has nothing to add to ours."""
        if not self._peers.fails_for_this_machine(first.reporter):
            return 0
        self._peers.wait_until_local_ones_ended(REFUSED_SECONDS)
        return REFUSED

    def _abandon(self, why: str) -> NoReturn:
        """End all ranks after a signal. Each gets its own; the first to decide tells the others,
        which have a moment to see it."""
        last_words = mute()
        with contextlib.suppress(dist.DistError):
            self._store.set("abandoned", why)
        self._peers.announce("stopped")
        if self.rank == 0:
            where = f"; run directory: {self.run_dir}" if self.run_dir else ""
            write_and_close(last_words, f"\nstopped: {why}{where}\n")
        time.sleep(2 * POLL_SECONDS)
        self._die(130)

    def _end_orphaned(self, why: str) -> NoReturn:
        if (
            self._signalled_within(SETTLE_SECONDS) or self._stop_at is not None
        ):  # a second Ctrl-C ended it
            self._abandon("ended at once")
        write_and_close(mute(), f"\nrank {self.rank} ends: {why}\n")
        self._die(1)

    def _die(self, exit_code: int) -> NoReturn:
        if self._old_signals and leads_group():
            os.killpg(os.getpid(), signal.SIGTERM)
        os._exit(exit_code)
