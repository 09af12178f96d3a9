"""One round of tools/chaos.py: start a run, kill it, resume it, check what is there."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path

from tools.chaos.checks import (
    Texts,
    exact_problems,
    finished_problems,
    kept_problems,
    kept_text,
    newest,
    refusal_problems,
    resumed_problems,
    text_problems,
)
from tools.chaos.killing import Job, Kill, KillPoint
from tools.chaos.plan import MESHES, STEPS, Round, victim_of, words_of

PROMPTS, GROUP = 8, 4
SMALL = [
    f"num_prompts={PROMPTS}", f"group_size={GROUP}", f"steps={STEPS}", "eval.every=2",
    "eval.num_prompts=8", "eval.num_samples=1", "log.tensorboard=false", "log.samples=-1",
    "batch_invariant=true",
]  # fmt: skip
TRIES = 3  # of a round whose run ended before it could be killed


@dataclass
class Outcome:
    """Result of a round.

    `resumed`: for each kill the step that the run resumed from, None where it started over.
    `changes`: resumes on another mesh. `exact`: the end was compared with an uninterrupted run.
    `missed`: attempts whose run ended before it could be killed.
    """

    kills: list[Kill] = field(default_factory=list)
    resumed: list[int | None] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    changes: int = 0
    exact: bool = False
    missed: int = 0

    @property
    def result(self) -> str:
        return "equal to the bit" if self.exact else "digests equal, continued"


class Chaos:
    """The rounds' folder, the uninterrupted runs, and how long each phase takes."""

    def __init__(self, words: list[str], folder: Path):
        self.words, self.folder = [*SMALL, *words], folder
        self.references: dict[str, Path] = {}
        self.durations: dict[str, float] = {}

    def folder_of(self, number: int) -> Path:
        return self.folder / f"round-{number}"

    def run(self, planned: Round) -> Outcome:
        """Run a round, again if its run ended before the kill. A failed one keeps its folder."""
        folder = self.folder_of(planned.number)
        for missed in range(TRIES):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            early = 1 - missed / (TRIES - 1)  # the last attempt kills as soon as the phase begins
            points = [replace(p, fraction=early * p.fraction) for p in planned.kill_points]
            outcome = Attempt(self, replace(planned, kill_points=tuple(points)), folder).run()
            if outcome is not None:
                outcome.missed = missed
                if not outcome.problems:
                    shutil.rmtree(folder)
                return outcome
        return Outcome(problems=["its run ended before it could be killed"], missed=TRIES)

    def reference(self, mesh: str) -> Path:
        """The directory of an uninterrupted run on `mesh`, which is made at the first call."""
        if mesh not in self.references:
            path = self.folder / f"reference-{mesh}"
            shutil.rmtree(path, ignore_errors=True)
            with self.start(mesh, self.new(path, every=1), path.with_suffix(".log")) as job:
                startup, status = job.started_seconds(), job.wait()
            if status != 0:
                raise SystemExit(f"{job.output}\nthe uninterrupted run failed")
            durations = job.durations() | {"startup": startup}
            self.durations = {k: min(v, self.durations.get(k, v)) for k, v in durations.items()}
            self.references[mesh] = path
        return self.references[mesh]

    def new(self, path: Path, every: int) -> list[str]:
        return [*self.words, f"run_dir={path}", f"checkpoint.every={every}"]

    def start(self, mesh: str, words: list[str], log: Path) -> Job:
        return Job("grpo.py", MESHES[mesh][0], [*words, *words_of(mesh)], log)


class Attempt:
    """All starts of a round's run, in order."""

    def __init__(self, chaos: Chaos, planned: Round, folder: Path):
        self.chaos, self.planned, self.folder = chaos, planned, folder
        self.reference = chaos.reference(planned.meshes[0])
        self.path, self.outcome = folder / "run", Outcome(exact=True)
        self.meshes = list(planned.meshes)  # of each start
        self.kept: list[Texts] = []  # lines of the logs before each checkpoint it resumed from
        self.step: int | None = None  # of the checkpoint that the next start resumes from

    def run(self) -> Outcome | None:
        """The outcome; None where a kill came too late."""
        try:
            for number, point in enumerate(self.planned.kill_points):
                if not self.killed(number, point):
                    return self.outcome if self.outcome.problems else None
                self.after_kill(number)
            self.finish()
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            self.outcome.problems.append(str(error))
        return self.outcome

    def killed(self, number: int, point: KillPoint) -> bool:
        """Start the run and kill it; False where it ended first, which must be with status 0."""
        with self.start(number) as job:
            kill = job.kill_at(point, self.chaos.durations, victim_of(point, self.meshes[number]))
            if kill is None and (status := job.wait()) != 0:
                self.outcome.problems.append(f"start {number} ended by itself, status {status}")
        if kill is not None:
            self.outcome.kills.append(kill)
            if kill.phase not in ("startup", "load"):
                self.check_start(job)
        return kill is not None

    def finish(self) -> None:
        with self.start(len(self.planned.kill_points)) as job:
            status = job.wait()
        self.check_start(job)
        self.check_end(status)

    def start(self, number: int) -> Job:
        words = self.chaos.new(self.path, self.planned.every)
        if self.step is not None:
            words = [f"resume={self.path}"]
            self.outcome.changes += self.meshes[number] != self.meshes[number - 1]
        return self.chaos.start(self.meshes[number], words, self.folder / f"start-{number}.log")

    def after_kill(self, number: int) -> None:
        """Choose what the next start resumes from; without a checkpoint it starts over."""
        if self.path.exists():
            shutil.copytree(self.path, self.folder / f"killed-{number}")
        self.step = newest(self.path)
        self.outcome.resumed.append(self.step)
        if self.step is None:
            self.check_refusal(number)
            shutil.rmtree(self.path, ignore_errors=True)
            self.meshes[number + 1] = self.meshes[0]
            self.kept, self.outcome.exact = [], True
            return
        self.kept.append(kept_text(self.path, self.step))
        if self.outcome.exact:
            self.outcome.problems += kept_problems(self.kept[-1], self.reference, self.step)
        if self.meshes[number + 1] != self.meshes[number]:
            self.outcome.exact = False

    def check_refusal(self, number: int) -> None:
        log = self.folder / f"refused-{number}.log"
        with self.chaos.start(self.meshes[number], [f"resume={self.path}"], log) as job:
            status = job.wait()
        self.outcome.problems += refusal_problems(job.output, status)

    def check_start(self, job: Job) -> None:
        if self.step is not None:
            self.outcome.problems += resumed_problems(job.output, self.path, self.step)

    def check_end(self, status: int) -> None:
        found = self.outcome.problems
        if status != 0:
            found.append(f"the last start ended with status {status}")
            return
        found += finished_problems(self.path, STEPS, PROMPTS * GROUP)
        found += text_problems(self.path, self.kept)
        if self.outcome.exact:
            found += exact_problems(self.path, self.reference)
