"""Values that are not finite in the trainer: found, named, and either the end or a skipped step.

Faults are real: they are put into a weight, a gradient, a rollout, an objective. One rank here;
two ranks and whole runs: faults/test_nonfinite_runs.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_trainer import accumulate, conf_of, num_tokens, passes_in, some_leaves
from small_trainer import trainer_of as trainer_for
from test_checkpoint import bits_of

from mesh.layout.reshard import Block, ParamLayout
from mesh.rl.losses import Loss, LossTokens, TokenLoss, clipped_surrogate
from mesh.rl.objective import Objective
from mesh.rl.packing import Leaf
from mesh.roles.nonfinite import BadParameter, BadSequence, Findings, merged, message, to_json
from mesh.roles.trainer import Trainer

GRADIENT = "gradient by the trainer logprob"
CLIPPED = Objective(Loss(clipped_surrogate))
pytestmark = pytest.mark.usefixtures("solo_mesh")


def trainer_of(*words: str, run_dir: Path | None = None) -> Trainer:
    return trainer_for(conf_of("trainer.warmup_steps=9", *words), run_dir)


def with_logprob(share: Sequence[Leaf], prompt_id: int, sample_id: int, at: int, value: float):
    """The leaves with another generator logprob of one token."""

    def changed(rollout):
        if rollout.key != (prompt_id, sample_id):
            return rollout
        return replace(
            rollout, logprobs=(*rollout.logprobs[:at], value, *rollout.logprobs[at + 1 :])
        )

    return [replace(leaf, rollouts=tuple(map(changed, leaf.rollouts))) for leaf in share]


def step(
    trainer: Trainer, share: Sequence[Leaf], objective: Objective = CLIPPED, waves: int = 1
) -> dict[str, float]:
    """One step over the leaves, all at once or a call for each of them."""
    kl_coef = 0.1 if trainer.reference is not None else 0.0
    for wave in [share] if waves == 1 else [[leaf] for leaf in share]:
        accumulate(trainer, passes_in(wave), replace(objective, kl_coef=kl_coef))
    return trainer.update(2.0, num_tokens(share))


def report_of(trainer: Trainer, share: Sequence[Leaf], objective: Objective = CLIPPED):
    """(error, line of nonfinite.jsonl) of a step that must end the run and leave all as it was."""
    before = bits_of(trainer)
    with pytest.raises(RuntimeError) as caught:
        step(trainer, share, objective)
    assert_equal_bits(bits_of(trainer), before)
    assert (trainer.steps, trainer.updates) == (0, 0)
    (line,) = Path(str(trainer.run_dir), "nonfinite.jsonl").read_text().splitlines()
    return str(caught.value), json.loads(line)


def assert_equal_bits(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert len(mine) > 60 and mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor.view(torch.int32), theirs[name].view(torch.int32)), name


@contextmanager
def broken_gradient(trainer: Trainer, name: str, value: float = torch.nan) -> Iterator[None]:
    """While it is open, one element of a parameter's gradient is this."""

    def spoil(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.to_local().view(-1)[5] = value

    handle = trainer.parameters()[name].register_post_accumulate_grad_hook(spoil)
    yield
    handle.remove()


def sequence(prompt_id: int, sample_id: int, position: int, what: str, value: str, *counts: int):
    ids = {"prompt_id": prompt_id, "sample_id": sample_id, "position": position}
    return ids | {"what": what, "value": value, "tokens": counts[0], "length": counts[1]}


def test_a_weight_is_named_with_the_sequences_that_it_reaches(tmp_path):
    """A norm's weight makes every logprob NaN: trainer logprobs alone, as the loss follows."""
    trainer = trainer_of(run_dir=tmp_path)
    with torch.no_grad():
        trainer.parameters()["layers.1.ffn_norm.weight"].to_local()[7] = torch.nan
    text, line = report_of(trainer, some_leaves())
    weight = {"name": "layers.1.ffn_norm.weight", "elements": 1, "total": 128}
    assert line["weights"] == {"count": 1, "first": [weight]}
    assert line["sequences"]["count"] == 4
    first = sequence(0, 0, 0, "trainer logprob", "nan", 3, 3)
    assert line["sequences"]["first"][0] == first
    assert {found["what"] for found in line["sequences"]["first"]} == {"trainer logprob"}
    assert line["gradients"]["count"] == line["parameters"] == len(trainer.master_names)
    names = [found["name"] for found in line["gradients"]["first"]]
    assert names == sorted(trainer.master_names)
    assert (line["step"], line["action"], line["loss"]) == (1, "stop", "nan")
    for words in (
        "on_nonfinite=stop: step 1 is not finite (loss nan, gradient norm nan)",
        "prompt_id=0 sample_id=0 position 0 of the response: trainer logprob nan (3 of 3 tokens)",
        "sequences: 4",
        "gradients: 24 of 24 parameters",
        "... 14 more lines",
        "the weights before the step: 1 of 24 parameters",
        "layers.1.ffn_norm.weight: 1 of 128 elements",
    ):
        assert words in text


def test_a_gradient_is_named_also_under_recomputation(tmp_path):
    name = "layers.0.attention.qkv_linear.wq.weight"
    for number, (mode, value) in enumerate((("none", torch.nan), ("full", -torch.inf))):
        run_dir = tmp_path / str(number)
        run_dir.mkdir()
        trainer = trainer_of(f"trainer.activation_checkpointing={mode}", run_dir=run_dir)
        with broken_gradient(trainer, name, value):
            text, line = report_of(trainer, some_leaves())
        first = {"name": name, "elements": 1, "total": 128 * 128}
        assert line["gradients"] == {"count": 1, "first": [first]}
        assert line["sequences"]["count"] == line["weights"]["count"] == 0
        assert f"{name}: 1 of 16384 elements" in text and "sequences: 0" in text
        assert line["loss"] not in ("nan", "inf", "-inf")


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_generator_logprob_is_named(tmp_path, value):
    """Also +inf, whose ratio is 0: neither the loss nor the gradient shows it."""
    text, line = report_of(
        trainer_of(run_dir=tmp_path), with_logprob(some_leaves(), 1, 0, 2, value)
    )
    found = sequence(1, 0, 2, "generator logprob", repr(float(value)), 1, 4)
    assert line["sequences"] == {"count": 1, "first": [found]}
    if value == torch.inf:
        assert line["gradients"]["count"] == 0
    assert f"response: generator logprob {float(value)} (1 of 4 tokens)" in text


def bad_surrogate(tokens: LossTokens) -> TokenLoss:
    """The policy's loss, NaN in the last two tokens of the third sequence."""
    loss_T, clipped_T = clipped_surrogate(tokens)
    rows = (tokens.sequence_T == 2).nonzero()[-2:, 0]
    return TokenLoss(loss_T.index_put((rows,), torch.tensor(torch.nan)), clipped_T)


BAD_LOSS = Objective(Loss(bad_surrogate))


def test_a_loss_is_named_where_it_alone_is_not_finite(tmp_path):
    trainer = trainer_of(run_dir=tmp_path)
    text, line = report_of(trainer, some_leaves(), BAD_LOSS)
    found = sequence(1, 0, 2, "loss", "nan", 2, 4)
    assert line["sequences"] == {"count": 1, "first": [found]}
    assert "response: loss nan (2 of 4 tokens)" in text


def test_a_loss_whose_gradient_is_not_finite_is_named(tmp_path):
    """A clipped ratio that overflows: its loss is the bound's, its gradient 0 * inf."""
    trainer = trainer_of(run_dir=tmp_path)
    _, line = report_of(trainer, with_logprob(some_leaves(), 0, 0, 1, -200.0))
    assert line["sequences"] == {"count": 1, "first": [sequence(0, 0, 1, GRADIENT, "nan", 1, 3)]}
    assert line["gradients"]["count"] == 24
    assert math.isfinite(float(line["loss"]))


FAULTS = ("weight of a step", "gradient", "generator logprob", "loss")


def faulty_step(trainer: Trainer, fault: str, waves: int) -> dict[str, float]:
    share = some_leaves()
    if fault == "gradient":
        with broken_gradient(trainer, "norm.weight"):
            return step(trainer, share, waves=waves)
    if fault == "loss":
        return step(trainer, share, BAD_LOSS)
    if fault == "generator logprob":
        return step(trainer, with_logprob(share, 0, 1, 0, torch.inf), waves=waves)
    weight = trainer.parameters()["layers.0.attention_norm.weight"].to_local()
    old = weight.detach().clone()
    with torch.no_grad():
        weight[3] = torch.inf
    metrics = step(trainer, share, waves=waves)
    with torch.no_grad():
        weight.copy_(old)
    return metrics


@pytest.mark.parametrize("fault", FAULTS)
def test_a_skipped_step_changes_nothing_but_the_time(fault, tmp_path, capsys):
    """Against a run that has the same steps without the update of the second: weights, moments,
    metrics. The learning rate still warms up by the number of steps."""
    waves = 1 if fault == "loss" else 2
    skipping = trainer_of("on_nonfinite=skip", "kl_coef=0.1", run_dir=tmp_path)
    other = trainer_of("kl_coef=0.1")
    first = step(skipping, some_leaves())
    assert first == step(other, some_leaves()) | {"skipped": 0.0}
    before = bits_of(skipping)
    capsys.readouterr()
    metrics = faulty_step(skipping, fault, waves)
    assert_equal_bits(bits_of(skipping), before)
    assert metrics["skipped"] == 1 and metrics["tokens/trained"] == 16
    assert metrics.keys() == first.keys()
    assert (skipping.steps, skipping.updates) == (2, 1)
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("skipped: step 2 is not finite (loss ")
    other.steps += 1
    for _ in range(2):
        mine, theirs = step(skipping, some_leaves()), step(other, some_leaves())
        assert mine == theirs | {"skipped": 0.0}
        assert_equal_bits(bits_of(skipping), bits_of(other))
    assert mine["lr"] == pytest.approx(1e-3 * 4 / 9)
    (line,) = (tmp_path / "nonfinite.jsonl").read_text().splitlines()
    assert json.loads(line)["action"] == "skip"


def test_a_first_step_that_is_skipped_leaves_an_optimizer_that_has_not_stepped():
    skipping, other = trainer_of("on_nonfinite=skip"), trainer_of()
    faulty_step(skipping, "gradient", 1)
    other.steps += 1
    for _ in range(2):
        assert_equal_bits(bits_of(skipping), bits_of(other))
        assert step(skipping, some_leaves()) == step(other, some_leaves()) | {"skipped": 0.0}


def test_replicas_and_tensor_parallel_ranks_are_heard_and_count_once():
    halves = [Block((0, 0), (2, 3)), Block((2, 0), (2, 3))]
    layouts = [ParamLayout("w", (4, 3), {}), ParamLayout("norm", (3,), {})]
    norm = Block((0,), (3,))
    nan = BadSequence(7, 0, 2, "loss", "nan", 1, 4)
    inf = BadSequence(5, 1, 0, "trainer logprob", "inf", 4, 4)
    parts = [
        Findings([nan], [("w", halves[0], 2)], []),
        Findings([nan, inf], [("w", halves[0], 2), ("norm", norm, 1)], []),
        Findings([], [("w", halves[1], 3), ("norm", norm, 2)], [("norm", norm, 1)]),
        Findings([replace(nan, value="inf")], [], []),
    ]
    metrics = {"loss": torch.inf, "grad_norm": torch.nan}
    report = merged(4, "stop", metrics, parts, layouts)
    assert report.sequences == [inf, replace(nan, value="inf"), nan]
    assert report.gradients == [BadParameter("norm", 2, 3), BadParameter("w", 5, 12)]
    assert report.weights == [BadParameter("norm", 1, 3)]
    assert "sequences: 2\n" in message(report) and "gradients: 2 of 2" in message(report)
    line = json.loads(to_json(report))
    assert line["sequences"]["count"] == 3 and line["grad_norm"] == "nan"
