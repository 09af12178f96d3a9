"""Run a recipe, unchanged, on a Monarch proc mesh, and restart it when a process dies.

    python tools/monarch.py recipes/grpo.py procs=4 conf=qwen3_tiny checkpoint.every=10

`procs=` processes run the recipe with the variables that torchrun would set. When one dies, the
others are ended, a new mesh is spawned, and the run continues from its newest checkpoint, or from
the beginning if it has none: at most `restarts=` times (default 3). A failure before the run
directory is made, such as a refused configuration, is not retried.

Several machines: `serve=HOST:PORT` on each, then `hosts=HOST:PORT,HOST:PORT` on one that reaches
them; `procs=` is then per host. Paths and environments must be the same on all. Whoever reaches
such a port can run code on the machine: use it only in a network that you trust.

Ctrl-C or SIGTERM goes to every process: the first asks the run to stop after its current step, a
second one ends it at once.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from mesh.config.keys import refuse
from mesh.config.loading import load_conf
from mesh.runs.directory import default_run_dir
from tools.monarch.jobs import Ended, Job
from tools.monarch.procs import Hosts, NoMeshError, Procs, serve

OWN = ("procs", "restarts", "hosts", "serve")
ENDING_SECONDS = 15.0  # for the other ranks to end by themselves after a first death
HURRY_SECONDS = 5.0  # the same after a second Ctrl-C
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Command:
    """The launcher's own arguments; `words` are the recipe's."""

    recipe: str
    words: list[str]
    procs: int
    restarts: int
    hosts: list[str]


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if argv else 2
    if argv[0].startswith("serve="):
        return serve(argv[0].removeprefix("serve="))
    try:
        command = read_command(argv)
    except ValueError as error:
        print(f"ValueError: {error}", file=sys.stderr)
        return 1
    try:
        return asyncio.run(Supervisor(command).supervise())
    except NoMeshError as error:
        where = f"hosts={','.join(command.hosts)}: " if command.hosts else ""
        remedy = "; serve=HOST:PORT must run on each" if command.hosts else ""
        return say(f"{where}no proc mesh could be made: {error}{remedy}")


def read_command(argv: list[str]) -> Command:
    """Parse the command line. Raises ValueError that lists all problems of the launcher's own
    arguments."""
    recipe, given = argv[0], [word for word in argv[1:] if word.partition("=")[0] in OWN]
    own = {"procs": "1", "restarts": "3", "hosts": ""}
    own |= {name: value for name, _, value in (word.partition("=") for word in given)}
    hosts = own["hosts"].split(",") if own["hosts"] else []
    wrong = []
    if not Path(recipe).is_file():
        wrong.append(f"{recipe}: no such file; name a recipe first, e.g. recipes/grpo.py")
    if not own["procs"].isdigit() or own["procs"] == "0":
        wrong.append(f"procs={own['procs']}: expected a whole number from 1; write e.g. procs=4")
    if not own["restarts"].isdigit():
        wrong.append(f"restarts={own['restarts']}: expected a whole number; write e.g. restarts=3")
    if not all(re.fullmatch(r"[^:]+:\d+", host) for host in hosts):
        wrong.append(f"hosts={own['hosts']}: expected HOST:PORT,HOST:PORT, where serve= runs")
    refuse(wrong)
    words = [word for word in argv[1:] if word not in given]
    return Command(recipe, words, int(own["procs"]), int(own["restarts"]), hosts)


class Supervisor:
    """Runs a recipe and restarts it until it ends."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.words, self.run_dir = with_run_dir(command.words)
        self.procs: Procs | None = None
        self.signals: list[int] = []
        self.hurry = asyncio.Event()

    async def supervise(self) -> int:
        """Run to the end. The exit status: 0, the recipe's own, or 1 if restarts are used up."""
        for number in SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)
        hosts = Hosts(self.command.hosts)
        begun = starts(self.run_dir)
        for attempt in range(self.command.restarts + 1):
            ended = await self._attempt(hosts, attempt)
            statuses = [end.status for end in ended if end.status]
            dead = [end for end in ended if end.status is None]
            if self.signals and (dead or statuses or not ended):
                return 128 + self.signals[0]
            if statuses or not dead:
                return statuses[0] if statuses else 0
            killed = [end for end in dead if end.killed]  # and the others followed
            first = (killed or dead)[0]
            cause = f"rank {first.rank}: {first.death}"
            early = self.run_dir is not None and starts(self.run_dir) == begun
            if attempt == 0 and early and not killed:
                return say(f"{cause}; it had not begun, so it is not started again")
            if attempt < self.command.restarts:
                where = newest_checkpoint(self.run_dir) or "the beginning"
                say(f"{cause}; restart {attempt + 1} of {self.command.restarts}, from {where}")
        return say(f"{cause}; restarts={self.command.restarts} are used up, run {self.run_dir}")

    async def _attempt(self, hosts: Hosts, attempt: int) -> list[Ended]:
        """Run the recipe once on a mesh of its own; how the ranks ended, the first to end first.

        The arguments are the same at each start: the recipe knows from TORCHELASTIC_RESTART_COUNT
        that it continues. The store is a new one: the old one holds addresses of dead processes.
        """
        store = dist.TCPStore(hosts.address, 0, is_master=True, wait_for_workers=False)
        master = {"MASTER_ADDR": hosts.address, "MASTER_PORT": str(store.port)}
        async with Procs(hosts, self.command.procs, threads(self.command.procs)) as self.procs:
            if self.signals:  # while the mesh was being made
                return []
            ranks = [
                asyncio.create_task(self.procs.run(rank, self._job(rank, attempt, master)))
                for rank in range(len(self.procs.points))
            ]
            ended = await self._wait_for(ranks)
        self.procs = None
        return ended

    def _job(self, rank: int, attempt: int, master: dict[str, str]) -> Job:
        assert self.procs is not None, "a job without a mesh"
        world_size, per_host = len(self.procs.points), self.command.procs
        environment = {
            "RANK": rank,
            "LOCAL_RANK": rank % per_host,
            "WORLD_SIZE": world_size,
            "LOCAL_WORLD_SIZE": per_host,
            "GROUP_RANK": rank // per_host,
            "GROUP_WORLD_SIZE": world_size // per_host,
            "TORCHELASTIC_USE_AGENT_STORE": True,  # the store lives in the launcher
            "TORCHELASTIC_RESTART_COUNT": attempt,
            "TORCHELASTIC_MAX_RESTARTS": self.command.restarts,
        }
        variables = master | {name: str(value) for name, value in environment.items()}
        return Job([os.path.abspath(self.command.recipe), *self.words], os.getcwd(), variables)

    async def _wait_for(self, ranks: list[asyncio.Task[Ended]]) -> list[Ended]:
        """Wait until all have ended, or ENDING_SECONDS after one has failed."""
        ended: list[Ended] = []
        pending = set(ranks)
        hurry = asyncio.create_task(self.hurry.wait())
        limit = None
        while pending:
            watched: set[asyncio.Task] = pending if hurry.done() else pending | {hurry}
            first = asyncio.FIRST_COMPLETED
            done, _ = await asyncio.wait(watched, timeout=limit, return_when=first)
            if not done:
                break
            ended += [task.result() for task in ranks if task in done]
            pending -= done
            if hurry.done():
                limit = HURRY_SECONDS
            elif any(end.status != 0 for end in ended):
                limit = ENDING_SECONDS
        hurry.cancel()
        for task in pending:
            task.cancel()
        return ended + [Ended(ranks.index(t), death="did not end and was killed") for t in pending]

    def _on_signal(self, number: int) -> None:
        self.signals.append(number)
        if len(self.signals) > 1:
            self.hurry.set()
        if self.procs is not None:
            for rank in range(len(self.procs.points)):
                asyncio.ensure_future(self.procs.kill(rank, number))


def with_run_dir(words: list[str]) -> tuple[list[str], Path | None]:
    """The arguments with a run directory, so that a restart finds it, and that directory.

    None if the configuration cannot be read: the recipe will say so.
    """
    if not any(word.startswith(("conf=", "resume=")) for word in words) or "conf=" in words:
        return words, None
    try:
        name, conf = load_conf([word for word in words if word.partition("=")[1]], resumes=True)
    except ValueError:
        return words, None
    if conf.run_dir is not None:
        return words, Path(conf.run_dir).expanduser()
    run_dir = default_run_dir(name)
    return [*words, f"run_dir={run_dir}"], run_dir


def newest_checkpoint(run_dir: Path | None) -> Path | None:
    """The newest `checkpoints/step-N`; a checkpoint gets that name when it is complete."""
    found = sorted((run_dir / "checkpoints").glob("step-*")) if run_dir is not None else []
    whole = [path for path in found if re.fullmatch(r"step-\d+", path.name)]
    return max(whole, key=lambda path: int(path.name[5:]), default=None)


def starts(run_dir: Path | None) -> int:
    """How often the run was started: each start writes an environment file."""
    return 0 if run_dir is None else len(list(run_dir.glob("environment*.json")))


def threads(procs: int) -> dict[str, str]:
    """As torchrun: one OpenMP thread where a host has several processes, unless it is set."""
    given = os.environ.get("OMP_NUM_THREADS")
    return {"OMP_NUM_THREADS": given or "1"} if given or procs > 1 else {}


def say(text: str) -> int:
    """Print a line of the launcher; returns the exit status 1."""
    print(f"monarch: {text}", file=sys.stderr, flush=True)
    return 1
