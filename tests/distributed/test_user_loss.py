"""loss=MODULE:NAME in a run, in the replay of a step of it, and in a validation: two ranks, one
launch.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest
from launching import Run, runs

from mesh.config.loading import read_conf
from mesh.runs.compare import untimed

NEGATIVE = 0.25
LOSS = ["loss=user_losses:ASYMMETRIC", f"loss_args.negative={NEGATIVE}"]
SMALL = [
    "conf=qwen3_tiny", "num_prompts=16", "group_size=4", "log.tensorboard=false",
    "generator.max_new_tokens=8",
]  # fmt: skip
RUN = [
    *SMALL, "steps=2", "eval.every=0", "eval.num_prompts=4", "eval.num_samples=1",
    "log.samples=-1", "batch_invariant=true",
]  # fmt: skip
VALIDATION = [*SMALL, "validate.sequences=9", "validate.steps=1", "validate.layouts=own"]


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> dict[str, Run]:
    """Runs of the user's loss and of the one that ships, a replay of the former, validations."""
    root: Path = tmp_path_factory.mktemp("user_loss")
    asked = {
        "user": ("grpo", [*RUN, *LOSS]),
        "stock": ("grpo", RUN),
        "replay": ("replay", [str(root / "user" / "run"), "step=2"]),
    }
    for name, loss in (("valid", LOSS), ("unrepeatable", ["loss=user_losses:UNREPEATABLE"])):
        asked[name] = ("validate", [*VALIDATION, *loss, f"run_dir={root / name / 'run'}"])
    return runs(root, 2, asked, {"unrepeatable": 1})


def rows(run: Run) -> dict[str, dict[str, dict]]:
    """The checks of a validation, by rung and what they compared."""
    found: dict[str, dict[str, dict]] = {}
    for check in json.loads((run.path / "validation.json").read_text())["checks"]:
        found.setdefault(check["rung"], {})[check["what"]] = check
    return found


def results(checks: dict[str, dict]) -> set[str]:
    return {check["result"] for check in checks.values()}


def test_a_run_minimises_the_users_loss(launched):
    """Every ratio is 1, so that a response's mean over its tokens is that of its advantage."""
    made: Run = launched["user"]
    for line in made.metrics[1:]:
        advantages = [s["advantage"] for s in made.samples if s["step"] == line["step"]]
        assert len(advantages) == 64 and min(advantages) < 0 < max(advantages)
        mean = fmean(a if a > 0 else NEGATIVE * a for a in advantages)
        assert line["loss"] == pytest.approx(-mean, rel=1e-6)
        assert line["ratio/max"] == 1 and line["clip_fraction"] == 0
    conf = read_conf(made.path / "config.yaml")
    assert (conf.loss, conf.loss_args) == ("user_losses:ASYMMETRIC", {"negative": str(NEGATIVE)})


def test_a_replay_reruns_the_users_loss(launched):
    """From the beginning, through both steps: with the loss that ships it would be the other run,
    which draws the same first tokens and differs in both steps."""
    user, stock = launched["user"], launched["stock"]
    num_metrics = len(untimed(user.metrics[2])) - 1
    num_samples = sum(row["step"] == 2 for row in user.kept)  # those of its evaluation too
    last = launched["replay"].output.splitlines()[-1]
    assert num_samples > 64
    assert last == f"equal to the bit: {num_metrics} metrics, {num_samples} samples"
    assert user.answers(1) == stock.answers(1)
    for mine, theirs in zip(user.metrics[1:], stock.metrics[1:], strict=True):
        for name in ("loss", "grad_norm", "digest/weights"):
            assert mine[name] != theirs[name]


def test_a_validation_passes_with_the_users_loss(launched):
    checks = rows(launched["valid"])
    assert checks.keys() == {"L0", "L1", "L2", "L3"}
    assert all(results(checks[rung]) == {"pass"} for rung in checks), launched["valid"].output


def test_a_validation_sees_that_the_users_loss_does_not_repeat(launched):
    """What trainer and generator compute of one step's weights is not concerned."""
    made = launched["unrepeatable"]
    checks = rows(made)
    failed = checks["L0"]["loss, gradient norm and other metrics"]
    assert failed["result"] == "FAIL"
    assert (failed["tally"]["first"]["what"], failed["tally"]["first"]["step"]) == ("loss", 0)
    assert checks["L0"]["digest of the weights"]["result"] == "FAIL"
    assert all(results(checks[rung]) == {"pass"} for rung in ("L1", "L2", "L3")), made.output
    assert "L0 FAILED" in made.output
