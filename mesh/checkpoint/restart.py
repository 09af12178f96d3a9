"""Automatic continuation of a run that its launcher restarts (`torchrun --max-restarts`).

The command line is the same at every attempt, so an attempt continues the run that the first one
began: after its newest checkpoint, or from the start if it has none yet.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mesh.checkpoint.folder import DAMAGED, prepare, remove, steps_in
from mesh.checkpoint.logs import KEPT_LOGS
from mesh.config.keys import Refusal
from mesh.config.loading import read_conf
from mesh.config.schema import Conf
from mesh.lifecycle.ending import restart_count
from mesh.lifecycle.process import Process
from mesh.runs.trackers import TRACKIO_ID, WANDB_ID

RUN_DIR = "run_dir"
OF_A_RUN = ("config.yaml", *KEPT_LOGS, "best", "tensorboard", WANDB_ID, TRACKIO_ID)


def after_restart(conf: Conf, process: Process) -> Conf:
    """Adapt `conf` to this attempt: name the directory of the run that an earlier attempt of the
    same launcher began, and resume it if it holds a checkpoint. Collective.

    A run without a checkpoint starts over in its directory. Nothing changes in a first attempt, or
    if the directory is another run's, which is then refused as at any other start.
    """
    if restart_count() == 0 or conf.resume is not None:
        return conf
    found = _begun(conf, process) if process.rank == 0 else None
    if isinstance(found := process.from_rank0(found), str):
        raise Refusal(found)
    path, resumes = found or (None, False)
    if path is not None:
        conf = replace(conf, run_dir=path, resume=path if resumes else None)
        how = "continues" if resumes else "starts over: it had no checkpoint yet"
        process.say(f"attempt {restart_count() + 1} {how}, run_dir={path}")
    return conf


def _begun(conf: Conf, process: Process) -> tuple[str, bool] | str | None:
    """(run directory of an earlier attempt, True if it holds a checkpoint); without one, that
    attempt's files are removed. None: no earlier attempt got that far. A text: it is still running.
    """
    name = conf.run_dir or process.guard.recall(RUN_DIR)
    if name is None:
        return None
    path = Path(name).expanduser()
    if path.is_symlink() or not _same_run(path / "config.yaml", conf):
        return None
    if used := process.lock.take(RUN_DIR, path):
        return used
    checkpoints = path / "checkpoints"
    if checkpoints.is_dir() and not checkpoints.is_symlink():
        prepare(checkpoints)
        if steps_in(checkpoints):
            return name, True
        if damaged := sorted(item.name for item in checkpoints.glob(f"step-*{DAMAGED}")):
            wrong = f"no intact checkpoint in {checkpoints}, only {damaged}"
            raise RuntimeError(f"{wrong}; start a new run")
    for item in (path / held for held in OF_A_RUN):
        if item.is_symlink() or item.exists():
            remove(item)
    return name, False


def _same_run(config: Path, conf: Conf) -> bool:
    """True if a config.yaml was written for this command line."""
    if config.is_symlink() or not config.is_file():
        return False
    return replace(read_conf(config), run_dir=conf.run_dir) == conf
