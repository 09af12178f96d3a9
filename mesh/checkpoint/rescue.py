"""The last completed step of a run that fails, as a checkpoint.

The main thread of a rank that did not fail is blocked in a collective, and no other collective can
run. But weights and moments rest outside of the optimizer's update. So the thread that is about to
end each rank (`mesh/lifecycle/guard.py`) forbids the next update, and all ranks agree through the
store: where each of them holds the state of one and the same step, each writes its part of it, and
rank 0 makes it a checkpoint like any other. A checkpoint that was being written is finished first.

Nothing is written where a rank was killed, does not answer, or failed inside an update.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mesh.checkpoint.files import Entry, Index, entry_of
from mesh.checkpoint.folder import PARTIAL, prepare, remove, steps_in
from mesh.checkpoint.logs import Sizes, copy_jobs
from mesh.checkpoint.pass_rates import rates_job
from mesh.checkpoint.state import OWN, own_blocks, own_layouts
from mesh.checkpoint.unlogged import file_name, write_unlogged
from mesh.checkpoint.writing import CheckpointWriter, Pending, write_blocks
from mesh.layout.holdings import local_tensors
from mesh.layout.reshard import ParamLayout
from mesh.lifecycle.ending import say
from mesh.lifecycle.meeting import Meeting
from mesh.rl.samples import StepRecord
from mesh.tasks.difficulty import Known
from mesh.weights.digest import local_digests

if TYPE_CHECKING:
    from mesh.checkpoint.keeper import Checkpointer

ANSWER_SECONDS = 10.0  # the longest that a rank may take to say what it holds
HOLD_SECONDS = 5.0  # the longest wait for the end of an update, and for the logs
WRITE_SECONDS = 600.0  # the longest that writing may take; a signal ends it before


@dataclass(frozen=True)
class Rest:
    """This rank's state between two steps: the index of its checkpoint without files and digests,
    the lengths of the logs, pass rates where they are kept, its shards by kind and name, which only
    an update changes, what was to be logged when it was trained, and whether that is done."""

    index: Index
    logs: Sizes
    rates: Known | None
    shards: Mapping[str, Mapping[str, Tensor]]
    unlogged: StepRecord | None
    logged: bool


@dataclass(frozen=True)
class Plan:
    """What all ranks do: finish the checkpoint of step `finish`, write that of step `write`, or
    not, and `why`. log: resuming has to log that step."""

    finish: int | None = None
    write: int | None = None
    why: str = ""
    log: bool = False


class Rescue:
    """Called by every rank when the run fails. Keeps what it needs from step to step."""

    def __init__(self, keeper: Checkpointer) -> None:
        self.keeper = keeper
        self.rest: Rest | None = None

    def note(self, index: Index, logs: Sizes, unlogged: StepRecord | None) -> None:
        """Remember the state of the step that has just been trained; no `unlogged`: it is logged.

        Rank 0 writes the logs, and fails at a line that others have passed or not reached. So what
        was to be logged is kept until the next step.
        """
        trainer, before = self.keeper.trainer, self.rest
        logged = unlogged is None
        if logged and before is not None and before.index.step == index.step:
            unlogged = before.unlogged
        with torch.no_grad():
            shards = {kind: local_tensors(part) for kind, part in trainer.state().items()}
            shards["weights"] = local_tensors(trainer.parameters())  # a tied one has both names
        rates = self.keeper.pass_rates.kept
        self.rest = Rest(index, logs, rates, shards, unlogged, logged)

    def __call__(self, meeting: Meeting) -> str:
        """Save what can be saved; what `resume=` will give, and why it is not more."""
        rest, pending = self.rest, self.keeper.pending
        if rest is None:
            return ""
        try:
            why = self._save(meeting, rest, pending)
        except (OSError, RuntimeError, ValueError) as error:  # the run's own error matters more
            why = str(error)
        saved = self._newest()
        lost = f"step {rest.index.step} is not saved: {why}\n" if why else ""
        if saved is None:
            return f"{lost}there is no checkpoint to resume from"
        return f"{lost}resume={self.keeper.run_dir} continues after step {saved}"

    def _save(self, meeting: Meeting, rest: Rest, pending: Pending | None) -> str:
        """The reason why the state of the last completed step is not saved; none if it is."""
        step = rest.index.step
        mine = {
            "step": step,
            "pending": pending and pending.index.step,
            "why": self._hold(rest),
            "saved": self._newest(),
            "logged": rest.logged,
        }
        answers = meeting.answers("rest", mine, ANSWER_SECONDS)
        plan = Plan(**meeting.decide("rest", asdict(plan_of(answers))))
        why = plan.why
        if pending is not None and plan.finish == pending.index.step:
            why = self._complete(meeting, pending, {}) or why
        if plan.write == step:
            why = self._write(meeting, rest, plan.log)
        return why

    def _hold(self, rest: Rest) -> str:
        """Forbid the next update; the reason why the shards are not those of the step."""
        trainer = self.keeper.trainer
        updates = trainer.optimizer.hold(HOLD_SECONDS) if trainer.model is not None else 0
        if updates is None:
            return f"rank {self.keeper.process.rank} failed, or hangs, inside an update"
        if updates != rest.index.updates:
            return f"rank {self.keeper.process.rank} failed between an update and the next sync"
        return ""

    def _newest(self) -> int | None:
        path = self.keeper.path
        return next(iter(steps_in(path)), None) if path.is_dir() else None

    def _write(self, meeting: Meeting, rest: Rest, log: bool) -> str:
        keeper, step = self.keeper, rest.index.step
        folder = keeper.path / f"step-{step}{PARTIAL}"
        jobs: dict[Path, Callable[[Path], Entry]] = {}
        if meeting.rank == 0:
            say(f"saving step {step}, the last completed one")
            meeting.tell("folder", self._make(folder, rest, jobs))
        why = meeting.answer("folder", 0, ANSWER_SECONDS)
        if why is None or why:
            return why or "rank 0 did not make its directory"
        sums: dict[str, int] = {}
        if keeper.own and rest.shards["weights"]:
            file = folder / f"rank-{meeting.rank}.safetensors"
            jobs[file] = partial(self._write_shards, rest.shards, sums)
        if log and rest.unlogged is not None:
            file = folder / file_name(meeting.rank)
            jobs[file] = partial(write_unlogged, rest.unlogged)
        pending = Pending(rest.index, CheckpointWriter(jobs))
        pending.writer.start()
        why = self._complete(meeting, pending, sums)
        if why and meeting.rank == 0:
            remove(folder)
        return why

    def _make(self, folder: Path, rest: Rest, jobs: dict[Path, Any]) -> str:
        """Make the directory, and add what copies the logs; the reason if that fails."""
        try:
            sizes = rest.logs(HOLD_SECONDS)
            jobs |= copy_jobs(self.keeper.run_dir, self.keeper.logs, sizes)
            jobs |= rates_job(folder, rest.rates)
            prepare(folder.parent)
            folder.mkdir()
        except (TimeoutError, RuntimeError) as error:  # of the thread that writes samples
            return str(error)
        except OSError as error:
            return f"{error.filename}: {error.strerror}"
        return ""

    def _write_shards(
        self, shards: Mapping[str, Mapping[str, Tensor]], sums: dict[str, int], path: Path
    ) -> Entry:
        """Write this rank's file, and add up the digests of what it holds."""
        keeper, rank = self.keeper, self.keeper.process.rank
        tensors: dict[str, Tensor] = {}
        blocks = keeper.own | own_blocks(keeper.trainer, rank)
        held = {"weights": keeper.digested, OWN: own_layouts(keeper.trainer)}
        for kind, part in shards.items():
            layouts = first_held(held.get(kind, keeper.layouts), rank)
            mine = on_host({layout.name: part[layout.name] for layout in layouts})
            sums[kind] = sum(local_digests(mine, layouts, rank).values())
            tensors |= {f"{kind}/{name}": x for name, x in mine.items() if name in blocks}
        return write_blocks(tensors, blocks, path)

    def _complete(self, meeting: Meeting, pending: Pending, sums: Mapping[str, int]) -> str:
        """Complete a checkpoint once all ranks have written their part; the reason if they cannot.
        `sums`: this rank's part of its digests, by kind, where the index has none."""
        writer, step = pending.writer, pending.index.step
        written = meeting.until(lambda: writer.outcome is not None, WRITE_SECONDS)
        outcome = writer.outcome if written else "was not written in time"
        mine: dict[str, Any] = {"sums": dict(sums)}
        if isinstance(outcome, dict):
            mine["files"] = {name: asdict(entry) for name, entry in outcome.items()}
        else:
            mine["why"] = f"rank {meeting.rank}: {outcome}"
        name = f"step-{step}"
        parts = meeting.answers(name, mine, WRITE_SECONDS)
        why = wrong_parts(parts)
        if meeting.rank == 0:
            try:
                if not why:
                    self.keeper.complete(filled(pending.index, parts, self.keeper.frozen))
            except OSError as error:
                why = f"{error.filename or self.keeper.path}: {error.strerror or error}"
            meeting.tell(f"{name}/end", why)
        found = meeting.answer(f"{name}/end", 0, WRITE_SECONDS)
        return "rank 0 did not complete the checkpoint" if found is None else found


def plan_of(answers: Sequence[Mapping[str, Any] | None]) -> Plan:
    """The plan that follows from what all ranks answered; None: a rank did not."""
    silent = [rank for rank, answer in enumerate(answers) if answer is None]
    if silent:
        return Plan(why=f"{ranks(silent)} cannot take part")
    said = [answer for answer in answers if answer is not None]
    pending, steps = ({answer[key] for answer in said} for key in ("pending", "step"))
    finish = next(iter(pending)) if len(pending) == 1 else None
    step, saved = said[0]["step"], said[0]["saved"]
    if step == saved or (finish is not None and finish == step):
        return Plan(finish)
    whys = [answer["why"] for answer in said if answer["why"]]
    if len(steps) > 1:
        whys.append(f"the ranks have completed different steps, {sorted(steps)}")
    if whys:
        return Plan(finish, why=whys[0])
    return Plan(finish, write=step, log=not said[0]["logged"])  # rank 0 writes the logs


def ranks(numbers: Sequence[int]) -> str:
    listed = ", ".join(map(str, numbers))
    return f"rank {listed}" if len(numbers) == 1 else f"ranks {listed}"


def wrong_parts(parts: Sequence[Mapping[str, Any] | None]) -> str:
    """Why a checkpoint is not complete; empty if all ranks have written theirs."""
    silent = [rank for rank, part in enumerate(parts) if part is None]
    said = [part["why"] for part in parts if part is not None and "why" in part]
    return "; ".join(said + ([f"{ranks(silent)} did not write in time"] if silent else []))


def filled(index: Index, parts: Sequence[Mapping[str, Any]], frozen: Mapping[str, str]) -> Index:
    """The index with the files of all ranks, and with digests where it has none yet."""
    files = {n: entry_of(entry) for part in parts for n, entry in part["files"].items()}
    if index.digests:
        return replace(index, files=files)
    kinds = sorted({kind for part in parts for kind in part["sums"]})
    totals = {kind: sum(part["sums"].get(kind, 0) for part in parts) for kind in kinds}
    digests = {kind: f"{total % (1 << 64):016x}" for kind, total in totals.items()}
    return replace(index, files=files, digests=digests | dict(frozen))


def first_held(layouts: Sequence[ParamLayout], rank: int) -> list[ParamLayout]:
    """Those of whose blocks this rank is the first holder."""
    held = (layout for layout in layouts if rank in layout.blocks)
    return [layout for layout in held if layout.holders()[layout.blocks[rank]][0] == rank]


@torch.no_grad()
def on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in host memory. A GPU copies them beside its main stream, on which a collective
    may hang."""
    devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
    with contextlib.ExitStack() as stack:
        for device in devices:
            stack.enter_context(torch.cuda.device(device))
            stack.enter_context(torch.cuda.stream(torch.cuda.Stream(device)))
        return {name: tensor.to("cpu").contiguous() for name, tensor in tensors.items()}
