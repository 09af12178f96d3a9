"""TensorBoard, W&B and trackio: what a run tells them of each step, in the form that each has.

Each is one class behind the same two verbs. A failure is an exception: `mesh/runs/feeds.py` calls
them, in threads of their own. What a user has to change, such as a missing login, is a Refusal.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mesh.config.keys import Refusal, problem
from mesh.runs.excerpts import COLUMNS, Row, as_markdown

WANDB_ID = "wandb-id.txt"
TRACKIO_ID = "trackio-id.txt"
SAMPLES = "samples"


@dataclass(frozen=True)
class Entry:
    """What trackers are told of one step. `histograms`: values by name, of all its rollouts.
    `samples`: rows of the samples file."""

    scalars: Mapping[str, int | float]
    histograms: Mapping[str, Sequence[float]] = field(default_factory=dict)
    samples: Sequence[Row] = ()


class Tracker(Protocol):
    """What is told of every step, once; it gets samples as `mesh/runs/excerpts.py` makes them."""

    def log(self, step: int, entry: Entry) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN_DIR/tensorboard. `first`: steps that a resumed run has taken; the events
    of later ones are dropped."""

    def __init__(self, run_dir: Path, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = first + 1 if first else None
        path = str(run_dir / "tensorboard")
        self._writer: Any = SummaryWriter(path, flush_secs=10, purge_step=purge)

    def log(self, step: int, entry: Entry) -> None:
        for key, value in entry.scalars.items():
            self._writer.add_scalar(key, value, step)
        for key, values in entry.histograms.items():
            self._writer.add_histogram(key, np.asarray(values), step)
        if entry.samples:
            self._writer.add_text(SAMPLES, as_markdown(entry.samples), step)

    def close(self) -> None:
        self._writer.close()


class Place:
    """How far a run has come at a tracker that cannot take back a step: its name there and the
    last step that it was told of, in a file of the run directory. The steps that a resumed run
    takes again are the same, and are not told twice."""

    def __init__(self, path: Path, prefix: str = "") -> None:
        self._path = path
        words = path.read_text().split() if path.exists() else []
        self.name = words[0] if words else prefix + secrets.token_hex(4)
        self._step = int(words[1]) if len(words) > 1 else -1
        self._write()

    def has(self, step: int) -> bool:
        return step <= self._step

    def reached(self, step: int) -> None:
        self._step = step
        self._write()

    def _write(self) -> None:
        partial = self._path.with_suffix(".partial")
        partial.write_text(f"{self.name}\n{self._step}\n")
        os.replace(partial, self._path)


class Wandb:
    """The W&B run of a run directory, the same one whenever it is resumed. The API key stays where
    W&B keeps it: in its own files or WANDB_API_KEY."""

    def __init__(self, project: str, run_dir: Path, config: Mapping[str, Any]) -> None:
        """Raises Refusal where W&B asks for something that the user has to do, such as a login."""
        import wandb

        self._wandb: Any = wandb
        self._place = Place(run_dir / WANDB_ID)
        try:
            self._run: Any = wandb.init(
                project=project, name=run_dir.name, dir=str(run_dir), config=dict(config),
                allow_val_change=True,  # a resumed run may have other `steps`
                id=self._place.name, resume="allow",
            )  # fmt: skip
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            remedy = "do as it says, e.g. wandb login or WANDB_MODE=offline, or leave it unset"
            raise Refusal(problem("log.wandb", project, f"W&B: {error}", remedy)) from error

    def log(self, step: int, entry: Entry) -> None:
        if self._place.has(step):
            return
        record: dict[str, Any] = dict(entry.scalars)
        for key, values in entry.histograms.items():
            record[key] = self._wandb.Histogram(values)
        if entry.samples:
            rows = [[row[name] for name in COLUMNS] for row in entry.samples]
            record[SAMPLES] = self._wandb.Table(
                columns=list(COLUMNS), data=rows, allow_mixed_types=True
            )
        self._run.log(record, step=step, commit=True)
        self._place.reached(step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """The trackio run of a run directory, the same one whenever it is resumed. It stays in files
    on this machine, unless the user names a Space or a server in trackio's own variables."""

    def __init__(self, project: str, run_dir: Path, config: Mapping[str, Any]) -> None:
        """Raises Refusal where trackio asks for something that the user has to do."""
        import trackio
        from huggingface_hub.errors import LocalTokenNotFoundError

        self._trackio: Any = trackio
        self._seen: set[str] = set()
        # it finds the run by its name alone
        self._place = Place(run_dir / TRACKIO_ID, f"{run_dir.name}-")
        try:
            with _nothing_asked():
                self._run: Any = trackio.init(
                    project=project, name=self._place.name, config=dict(config), resume="allow",
                    embed=False, auto_log_cpu=False, auto_log_gpu=False,
                    private=True,  # a Space that it makes would be public: rollouts are in it
                )  # fmt: skip
        except (ValueError, LocalTokenNotFoundError) as error:
            remedy = "do as it says, or leave it unset"
            raise Refusal(problem("log.trackio", project, f"trackio: {error}", remedy)) from error

    def log(self, step: int, entry: Entry) -> None:
        if self._place.has(step):
            return
        record: dict[str, Any] = dict(entry.scalars)
        for key, values in entry.histograms.items():
            record[key] = self._trackio.Histogram(values)
        if entry.samples:
            record[SAMPLES] = self._trackio.Table(data=[dict(row) for row in entry.samples])
        self._run.log(record, step=step)
        self._place.reached(step)
        self._raise_its_failures()

    def close(self) -> None:
        self._run.finish()
        self._raise_its_failures()

    def _raise_its_failures(self) -> None:
        """Raise what trackio has only warned of: it writes in a thread, and raises nothing."""
        new = set(self._run._warned_failures) - self._seen
        self._seen |= new
        if new:
            raise RuntimeError(f"{', '.join(sorted(new))}: see its own warning")


@contextmanager
def _nothing_asked() -> Iterator[None]:
    """Keep a run of trackio that stays on this machine from the network: even then it asks the Hub
    for the name of the user whose token it finds, without a time limit."""
    import trackio.run

    module: Any = trackio.run
    ask = module._get_default_namespace
    if not (os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")):
        module._get_default_namespace = lambda: None
    try:
        yield
    finally:
        module._get_default_namespace = ask
