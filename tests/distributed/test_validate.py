"""The validation run: what it compares, that it sees, and what it says where a kernel is broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import launch, runs

from mesh.config.loading import load_conf
from mesh.config.schema import Conf
from mesh.exactness.verdict import AGREED
from mesh.exactness.walk import mixed_requests, part_of
from mesh.lifecycle.process import Process
from mesh.program.assembly import check

SMALL = [
    "conf=qwen3_tiny", "num_prompts=8", "group_size=4", "model.max_length=64",
    "generator.max_new_tokens=8", "validate.sequences=33", "validate.steps=2",
    "log.tensorboard=false",
]  # fmt: skip
SEQUENCES, TOKENS = 33, 8
BATCHES = "generator, batches of 1, 2, 3, 7, 8, 17, 33"


def conf_of(*words: str) -> Conf:
    return load_conf([*SMALL, *words])[1]


def validated(path: Path, num_ranks: int, *words: str, status: int = 0) -> tuple[str, dict]:
    """(stdout, validation.json) of a validation run."""
    command = [*SMALL, *words, f"run_dir={path / 'run'}"]
    done = launch("recipes/validate.py", num_ranks, *command, status=status, path=path)
    return done.stdout, report_in(path / "run")


def report_in(run_dir: Path) -> dict:
    return json.loads((run_dir / "validation.json").read_text())


# A task whose import breaks a line of the recipe's step: where the generator gives memory to the
# trainer, a weight changes. Here, in a world of one, both roles have the same storage.
RELEASING = """
from dataclasses import dataclass

from mesh.roles.generator import Generator
from mesh.tasks.spell_backward import SpellBackward

release = Generator.release


def release_and_spoil(self):
    release(self)
    self.weights()["norm.weight"].mul_(1 + 2**-10)


Generator.release = release_and_spoil


@dataclass(frozen=True)
class Task(SpellBackward):
    pass
"""
ALONE = {
    # greedy samples of a prompt are equal: a row that dropped such groups would compare nothing
    "bfloat16": [
        "trainer.dtype=bfloat16",
        "generator.dtype=bfloat16",
        "validate.control=true",
        "drop_equal_groups=true",
        "updates_per_step=2",
    ],
    "conversations": [
        "task=talking_tasks:Chatty",
        "model.max_length=64",
        "reward.workers=0",
        "validate.sequences=17",
        "validate.steps=1",
        "validate.control=true",
    ],
    # the last one in its process, as what its task breaks stays broken
    "releasing": ["task=releasing:Task", "reward.workers=0"],
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, tuple[str, dict]]:
    """(stdout, validation.json) of validations on one rank, which share a launch."""
    root = tmp_path_factory.mktemp("alone")
    (root / "releasing.py").write_text(RELEASING)
    asked = {
        name: ("validate", [*SMALL, *words, f"run_dir={root / name / 'run'}"])
        for name, words in ALONE.items()
    }
    made = runs(root, 1, asked, {"releasing": 1}, path=root)
    return {name: (run.output, report_in(run.path)) for name, run in made.items()}


def rows(report: dict, rung: str) -> dict[str, dict]:
    """The checks of a rung by what they compared."""
    return {check["what"]: check for check in report["checks"] if check["rung"] == rung}


def test_every_rung_holds_on_four_ranks_in_every_layout(tmp_path: Path):
    output, report = validated(tmp_path, 4)
    assert report["passed"] is True
    assert {check["result"] for check in report["checks"]} == {"pass"}, output
    batch = SEQUENCES * TOKENS
    least = {"L0": 4, "L1": batch, "L2": 8, "L3": 2 * batch}
    for rung, compared in least.items():
        assert all(row["tally"]["compared"] >= compared for row in rows(report, rung).values())
    # every engine makes all of the batch, every trainer rank its share
    sequences = 1 + 2 + 3 + 7 + 8 + 17 + 33
    assert rows(report, "L1")[BATCHES]["tally"] == {
        "compared": 4 * sequences * TOKENS, "different": 0, "not_finite": 0, "first": None,
    }  # fmt: skip
    assert rows(report, "L1")["trainer, each sequence alone"]["tally"]["compared"] == batch
    assert {row.split(":")[0] for row in rows(report, "L3")} == {
        "the whole batch on every engine", "colocated 4", "split 1+3", "split 2+2", "split 3+1",
    }  # fmt: skip
    for role in (*(f"tp {n}, generator" for n in (1, 2, 4)), "tp 2 sp,", "tp 4 sp,"):
        assert any(role in layout for layout in report["layouts"]), role
    for role in ("dp 4 tp 1", "dp 2 tp 2", "dp 1 tp 4", "dp 3 tp 1", "dp 1 tp 2"):
        assert any(layout.endswith(f"generator {role}") for layout in report["layouts"]), role
    assert report["dtype"] == "float32" and report["keys"]["batch_invariant"] is True
    assert "comparisons" in report["self_test"] and report["self_test"] in output
    assert report["machine"]["world_size"] == len(report["machine"]["ranks"]) == 4
    starts = [text[:2] for text in output.splitlines()]
    assert [starts.count(rung) for rung in least] == [len(rows(report, rung)) for rung in least]
    assert "L0, L1, L2, L3 of the exactness ladder hold here" in output


def test_every_rung_holds_for_conversations_and_sees_ordinary_kernels(alone):
    """The batch has three turns a sequence, so that more is compared than its first turns; the
    control keeps pages between turns, and differs."""
    output, report = alone["conversations"]
    assert report["passed"] is True, output
    for rung in ("L0", "L1", "L2"):
        assert {row["result"] for row in rows(report, rung).values()} == {"pass"}, output
    assert rows(report, "L1")["trainer, each sequence alone"]["tally"]["compared"] > 17 * 10
    assert sum(row["differ_without"] for row in rows(report, "L1").values()) > 10
    preempted = rows(report, "L1")["generator, sequences preempted"]
    assert preempted["not_run"] is None and preempted["tally"]["compared"] > 17 * 10


def test_bfloat16_holds_and_ordinary_kernels_would_be_seen(alone):
    output, report = alone["bfloat16"]
    assert report["passed"] is True and report["dtype"] == "bfloat16"
    assert report["keys"]["batch_invariant"] is True
    for rung in ("L1", "L2"):
        found = rows(report, rung).values()
        assert {row["result"] for row in found} == {"pass"}, output
        assert sum(row["differ_without"] for row in found) > 10, rung
    assert rows(report, "L2")["2 steps of the loop"]["differ_without"] > 20
    layouts = rows(report, "L3")["layouts"]
    assert (layouts["result"], layouts["not_run"]) == ("not run", "one rank")
    assert "differ without" in output and "L0, L1, L2 of the exactness ladder hold here" in output


def test_the_step_that_is_validated_is_the_recipes_own(alone):
    """Its release changes a weight between the rollouts and the training of a wave: only the rows
    that take the recipe's step see it, and run again with one set of weights both sides agree."""
    output, report = alone["releasing"]
    failed = {(check["rung"], check["what"]) for check in report["checks"]
              if check["result"] == "FAIL"}  # fmt: skip
    assert failed == {
        ("L2", "2 steps of the loop"),
        ("L2", "ratio and logprob difference of these steps"),
    }, output
    loop = rows(report, "L2")["2 steps of the loop"]["tally"]
    assert loop["different"] > loop["compared"] / 2
    assert loop["first"]["module"] == AGREED
    assert {row["result"] for row in rows(report, "L0").values()} == {"pass"}
    assert "L2 FAILED" in output


# A task whose import breaks two kernels: SwiGLU of the last layer in small decode batches, and the
# output projection of the first attention wherever it is cut over two ranks, in both roles.
BROKEN = """
from dataclasses import dataclass

from mesh.model import layers, policy
from mesh.tasks.spell_backward import SpellBackward

now = {"few": False, "layer": None}


def hidden(self, tokens_T, positions_T, context):
    now["few"] = context.cache is not None and context.max_query == 1 and len(tokens_T) < 8
    return whole(self, tokens_T, positions_T, context)


def init(self, config):
    build(self, config)
    for name, layer in self.layers.items():
        layer.register_forward_pre_hook(lambda *_, name=name: now.update(layer=name))
    self.get_submodule("layers.0.attention.wo").register_forward_hook(
        lambda module, _, out: out if module.tp_group is None else out * (1 + 2**-20)
    )


def gated(gate, up):
    out = swiglu(gate, up)
    return out * (1 + 2**-10) if now["few"] and now["layer"] == "1" else out


build, whole, swiglu = policy.Policy.__init__, policy.Policy.hidden, layers.swiglu
policy.Policy.__init__, policy.Policy.hidden, layers.swiglu = init, hidden, gated


@dataclass(frozen=True)
class Task(SpellBackward):
    pass
"""


def test_broken_kernels_are_caught_and_named(tmp_path: Path, process: Process):
    (tmp_path / "broken.py").write_text(BROKEN)
    # the ranks score by themselves: a process that scores would import the model, and torch, too
    words = ["task=broken:Task", "reward.workers=0"]
    output, report = validated(tmp_path, 2, *words, status=1)
    assert report["passed"] is False
    assert {row["result"] for row in rows(report, "L0").values()} == {"pass"}, output

    requests = mixed_requests(conf_of(), check(conf_of(), process), process)
    (alone,) = part_of(requests, 1)
    batches = rows(report, "L1")[BATCHES]
    assert batches["result"] == "FAIL"
    first = batches["tally"]["first"]
    assert first["module"] == "layers.1.feed_forward.swiglu"
    assert first["module_position"] == len(alone.tokens) - 1
    assert (first["prompt_id"], first["sample_id"]) == (alone.prompt_id, 0)
    assert len(alone.tokens) <= first["position"] <= len(alone.tokens) + 1
    # the batch sizes below 8 are those that the broken kernel sees
    assert 2 < batches["tally"]["different"] <= 2 * (1 + 2 + 3 + 7) * TOKENS
    assert rows(report, "L1")["trainer, each sequence alone"]["result"] == "pass"
    loop = rows(report, "L2")["2 steps of the loop"]["tally"]["first"]
    assert loop["module"] == "layers.1.feed_forward.swiglu" and loop["step"] == 0

    by_degrees = {
        tuple("tp 2" in role for role in layout.split(",")): check
        for layout, check in rows(report, "L3").items()
        if layout.startswith("colocated")
    }
    assert by_degrees.pop((False, False))["result"] == "pass", output
    assert len(by_degrees) == 3
    for row in by_degrees.values():
        assert row["result"] == "FAIL"
        assert row["tally"]["first"]["module"] == "layers.0.attention.wo"
        assert row["tally"]["first"]["module_position"] == 0
    assert "L1, L2, L3 FAILED" in output
    assert "first divergent module layers.0.attention.wo at position 0" in output
