"""A teacher in whole runs on two ranks: layouts, a replay, resuming, validations; one launch."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from launching import Run, launch, runs
from safetensors.torch import load_file, save_file

from mesh.config.schema import PACKAGE_DATA

TINY = PACKAGE_DATA / "qwen3_tiny"
SMALL = [
    "conf=qwen3_tiny", "num_prompts=8", "group_size=4", "log.tensorboard=false",
    "generator.max_new_tokens=8", "batch_invariant=true", "eval.num_prompts=4",
    "eval.num_samples=1", "eval.every=0",
    "trainer.lr=1e-4", "trainer.warmup_steps=0",
]  # fmt: skip
STRICT = [*SMALL, "steps=3", "check=strict", "checkpoint.every=2", "checkpoint.best=false",
          "log.samples=-1"]  # fmt: skip
TP = ["trainer.tp=2", "trainer.dp_shard=1"]
VALIDATION = [*SMALL, "validate.sequences=9", "validate.steps=1", "validate.layouts=own"]


def moved(path: Path, seed: int) -> Path:
    """The tiny model with other weights."""
    shutil.copytree(TINY, path)
    file, generator = path / "model.safetensors", torch.Generator().manual_seed(seed)
    weights = {
        name: x + 0.5 * torch.randn(x.shape, generator=generator) * x.std()
        for name, x in load_file(file).items()
        if x.ndim == 2
    }
    save_file(load_file(file) | weights, file, metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("teachers")


@pytest.fixture(scope="module")
def launched(root) -> dict[str, Run]:
    teacher = f"teacher.path={moved(root / 'teacher', 1)}"
    full = ["loss=distill", teacher, "teacher.kl=full"]
    sampled = ["loss=grpo", teacher, "teacher.coef=0.5", "entropy_coef=0.01",
               "updates_per_step=2"]  # fmt: skip
    asked = {
        "full": ("grpo", [*STRICT, *full]),
        "full_tp": ("grpo", [*STRICT, *full, *TP]),
        "sampled": ("grpo", [*STRICT, *sampled]),
        "replay": ("replay", [str(root / "full" / "run"), "step=3"]),
        "replay_sampled": ("replay", [str(root / "sampled" / "run"), "step=3"]),
        "valid": ("validate", [*VALIDATION, *full, f"run_dir={root / 'valid' / 'run'}"]),
    }
    return runs(root, 2, asked)


def test_strict_runs_with_a_teacher_measure_and_lower_the_kl_to_it(launched):
    for name in ("full", "full_tp", "sampled"):
        metrics = launched[name].metrics[1:]
        assert [line["logprob_diff/max"] for line in metrics] == [0.0] * 3
        assert all("kl" not in line and line["grad_norm"] > 0 for line in metrics)
    kls = [line["teacher_kl"] for line in launched["full"].metrics[1:]]
    assert kls[0] > 0.01 and kls[2] < kls[0]
    for one, other in zip(launched["full"].metrics[1:2], launched["full_tp"].metrics[1:2],
                          strict=True):  # fmt: skip
        for name in ("teacher_kl", "loss", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-4)


@pytest.mark.parametrize("name", ["replay", "replay_sampled"])
def test_a_replay_has_the_teacher(launched, name):
    assert launched[name].output.splitlines()[-1].startswith("equal to the bit: ")


def test_a_validation_passes_with_a_teacher(launched):
    assert "FAIL" not in launched["valid"].output
    assert "teacher: batch-invariant" not in launched["valid"].output, "its shape is the policy's"


def test_a_resumed_run_has_the_teacher_by_its_weights(launched, root):
    """Moved elsewhere, it is the same; with other weights it is refused."""
    source = launched["full"].path
    elsewhere = shutil.copytree(root / "teacher", root / "elsewhere")
    for name in ("same", "other"):
        shutil.copytree(source, root / name)
        shutil.rmtree(root / name / "checkpoints" / "step-3")
    edit = root / "same" / "config.yaml"
    edit.write_text(edit.read_text().replace(str(root / "teacher"), str(elsewhere)))
    launch("recipes/grpo.py", 1, f"resume={root / 'same'}", "log.progress=false")
    lines = Run(root / "same", "").metrics
    assert lines[-1]["teacher_kl"] == pytest.approx(launched["full"].metrics[-1]["teacher_kl"])
    shutil.rmtree(root / "teacher")
    moved(root / "teacher", 2)
    done = launch("recipes/grpo.py", 1, f"resume={root / 'other'}", status=1)
    assert "teacher.path=" in done.stdout + done.stderr
    assert "its weights are not those that" in done.stdout + done.stderr
