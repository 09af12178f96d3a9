"""check=strict with the real recipe: a kernel that is broken on purpose is caught and named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import Run, launch, runs

from mesh.runs.compare import untimed

SMALL = [
    "conf=qwen3_tiny", "num_prompts=16", "group_size=4", "steps=2", "waves=2",
    "eval.every=0", "eval.num_prompts=8", "log.tensorboard=false", "log.samples=-1",
    "batch_invariant=true",
]  # fmt: skip
POSITION = 6

# A task whose import breaks the model: from STEP on, one module rounds the rows of decode steps
# that lie at POSITION in their sequence to bfloat16, on the last of its tensor-parallel ranks.
BROKEN = f"""
from dataclasses import dataclass

import torch.distributed as dist

from mesh.model import layers, policy
from mesh.tasks.spell_backward import SpellBackward

POSITION = {POSITION}
STEP, MODULE = WHERE
now = {{"step": -1, "rows": None, "layer": None}}


def round_rows(out):
    rows = now["rows"]
    if rows is None or now["step"] < STEP:
        return out
    out = out.clone()
    out[0, rows] = out[0, rows].bfloat16().to(out.dtype)
    return out


def hidden(self, tokens_T, positions_T, context):
    decode = context.cache is not None and context.max_query == 1
    now["rows"] = positions_T == POSITION if decode else None
    return whole(self, tokens_T, positions_T, context)


def init(self, config):
    build(self, config)
    for name, layer in self.layers.items():
        layer.register_forward_pre_hook(lambda *_, name=name: now.update(layer=name))
    if MODULE != "swiglu":
        self.get_submodule(MODULE).register_forward_hook(
            lambda module, _, out: out if not_last(module) else round_rows(out)
        )


def not_last(module):
    group = module.tp_group
    return group is not None and dist.get_rank(group) < dist.get_world_size(group) - 1


def gated(gate, up):
    out = swiglu(gate, up)
    return round_rows(out) if MODULE == "swiglu" and now["layer"] == "1" else out


build, whole, swiglu = policy.Policy.__init__, policy.Policy.hidden, layers.swiglu
policy.Policy.__init__, policy.Policy.hidden, layers.swiglu = init, hidden, gated


@dataclass(frozen=True)
class Task(SpellBackward):
    def train_prompts(self, step, num):
        now["step"] = step
        return super().train_prompts(step, num)
"""
# the ranks score by themselves: a process that scores would import the model, and torch, too
BROKEN_TASK = ["task=broken:Task", "reward.workers=0"]


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> dict[str, Run]:
    """The run without the check and with it."""
    asked = {"plain": ("grpo", SMALL), "strict": ("grpo", [*SMALL, "check=strict"])}
    return runs(tmp_path_factory.mktemp("both"), 1, asked)


@pytest.fixture
def plain(both) -> Run:
    return both["plain"]


def broken(path: Path, num_ranks: int, where: tuple[int, str], *words: str) -> tuple[str, dict]:
    """(stderr, strict.json) of a run whose model is broken."""
    (path / "broken.py").write_text(BROKEN.replace("WHERE", repr(where)))
    command = [*SMALL, "check=strict", *BROKEN_TASK, *words, f"run_dir={path / 'run'}"]
    done = launch("recipes/grpo.py", num_ranks, *command, status=1, path=path)
    return done.stderr, json.loads((path / "run" / "strict.json").read_text())


def first_of(run: Run, step: int) -> tuple[int, int]:
    """The first sequence of a step in which the token after POSITION is drawn in a decode step."""
    reaching = [
        (s["prompt_id"], s["sample_id"])
        for s in run.samples
        if s["step"] == step
        and len(s["prompt"]) - 1 <= POSITION
        and len(s["prompt"]) + len(s["response"]) + (s["finish_reason"] == "stop") > POSITION + 1
    ]
    assert len(reaching) > 4
    return min(reaching)


def test_an_exact_run_finishes_with_the_same_metrics(both):
    run, plain = both["strict"], both["plain"]
    assert len(run.metrics) == len(plain.metrics) == 3
    for mine, theirs in zip(run.metrics, plain.metrics, strict=True):
        assert untimed(mine) == untimed(theirs)
        assert mine.get("logprob_diff/max", 0) == 0
    assert run.samples == plain.samples
    assert not (run.path / "strict.json").exists()


def check_report(output: str, report: dict, key: tuple[int, int], step: int) -> None:
    """What every report says of a model broken at POSITION."""
    first, replay = report["first"], report["replay"]
    assert (first["prompt_id"], first["sample_id"]) == key
    assert (report["step"], replay["position"], first["position"]) == (step, POSITION, POSITION + 1)
    assert 0 < report["differing"] < report["tokens"]
    mine, theirs = (float.fromhex(first[side]["hex"]) for side in ("trainer", "generator"))
    assert mine != theirs and mine == pytest.approx(theirs, abs=0.1)
    assert first["trainer"]["value"] == repr(mine)
    for words in (
        f"step {step}: trainer and generator logprobs differ",
        f"prompt_id={key[0]} sample_id={key[1]}",
        f"{POSITION + 1} of the sequence",
        f"{mine!r} ({mine.hex()})",
        f"{theirs!r} ({theirs.hex()})",
        f"differing: {report['differing']} of {report['tokens']} tokens",
        f"first divergent module: {replay['module']} at position {POSITION} of the sequence",
    ):
        assert words in output


def test_a_function_that_is_broken_from_the_second_step_on_is_named(plain, tmp_path):
    output, report = broken(tmp_path, 1, (1, "swiglu"))
    check_report(output, report, first_of(plain, 2), 2)
    assert report["replay"]["module"] == "layers.1.feed_forward.swiglu"
    assert len(Run(tmp_path / "run", "").metrics) == 2, "the first step was exact"


def test_a_module_that_one_tensor_parallel_rank_breaks_is_named_on_split_meshes(plain, tmp_path):
    layout = ["mesh.mode=split", "trainer.dp_shard=2", "generator.tp=2"]
    output, report = broken(tmp_path, 4, (0, "layers.0.attention.k_norm"), *layout)
    check_report(output, report, first_of(plain, 1), 1)
    assert report["replay"]["module"] == "layers.0.attention.k_norm"
    difference = report["replay"]["difference"]
    assert difference["width"] == 128 and difference["feature"] >= 64, "the second rank's heads"
    assert 1 < difference["count"] <= 64
