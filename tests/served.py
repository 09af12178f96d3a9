"""Runs whose export a vLLM of its own serves, started as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launching import REPOSITORY, Run, run
from tiny_qwen3 import random_sequences

WORDS = ["conf=qwen3_tiny", "steps=1", "num_prompts=4", "group_size=4", "batch_invariant=true"]
WORDS += ["trainer.lr=1e-30", "log.samples=-1", "log.tokens=true", "log.tensorboard=false"]
WORDS += ["eval.num_prompts=4", "eval.num_samples=1"]
LENGTHS = [1, 16, 5, 22]
"""Of prompts."""
NEW_TOKENS = 20
PROGRAM = str(REPOSITORY / "tests/programs/serve_program.py")


def entry_points(place: Path) -> Path:
    """A directory in whose metadata the package has the entry points of pyproject.toml, also where
    the installed metadata is older.
    """
    declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    metadata = place / "mesh-0.0.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: mesh\nVersion: 0.0.0\n")
    lines = []
    for group, names in declared["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in names.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return place


def environment(place: Path) -> dict[str, str]:
    """A user's, without what our own engine tells vLLM."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    machine = "VLLM_USE_FLASHINFER_SAMPLER"  # of a machine that has no flashinfer, not of ours
    kept |= {machine: os.environ[machine]} if machine in os.environ else {}
    return kept | {
        "PYTHONPATH": os.pathsep.join(
            [
                str(entry_points(place)),
                str(REPOSITORY),
                *kept.get("PYTHONPATH", "").split(os.pathsep),
            ]
        ),
        "TORCH_COMPILE_DISABLE": "1",  # vLLM compiles the count of likelier tokens, for 5 seconds
    }


@dataclass(frozen=True)
class Served:
    """A run of one step that changes no weight, and what its model answers at tp 1 and 2."""

    run: Run
    prompts: list[list[int]]
    answers: dict[int, dict[str, Any]]

    @property
    def directory(self) -> Path:
        return self.run.path / "model"


def served(
    root: Path, words: Sequence[str], degrees: Sequence[int], options: dict[str, Any], **own: str
) -> Served:
    """Train a step, and serve its export at each tp degree, side by side. options: of LLM; own:
    variables of the servers' environment.
    """
    trained = run("recipes/grpo.py", root / "run", 1, *WORDS, *words)
    prompts = random_sequences(LENGTHS, seed=9, vocab_size=98)
    scored = [sample["prompt_tokens"] + sample["tokens"] for sample in trained.samples]
    settings = {"batch_invariant": True}
    asked = {"scored": scored, "prompts": prompts, "settings": settings, "options": options}
    (root / "asked.json").write_text(json.dumps(asked))
    environ, started = environment(root / "metadata") | own, {}
    for tp in degrees:
        words = [str(root / "run" / "model"), str(tp), str(root / "asked.json")]
        started[tp] = subprocess.Popen(
            [sys.executable, PROGRAM, *words, str(root / f"{tp}.json")],
            env=environ, cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    for process in started.values():
        output, _ = process.communicate(timeout=500)
        assert process.returncode == 0, output[-20000:]
        assert "comparisons of" in output, "the self-test's line"
    answers = {tp: json.loads((root / f"{tp}.json").read_text()) for tp in started}
    return Served(trained, prompts, answers)
