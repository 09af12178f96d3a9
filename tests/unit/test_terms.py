"""Terms that combine with any loss: KL, importance weights, length penalty; and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from loss_batches import batch_of, gradient_of, loss_of
from small_trainer import (
    accumulate,
    conf_of,
    num_tokens,
    objective_for,
    passes_in,
    some_leaves,
    trainer_of,
)

from mesh.program.loss_checks import read_loss
from mesh.rl.advantages import equal_groups, rewards_of
from mesh.rl.losses import LOSSES, Importance
from mesh.rl.losses.divergence import k1_T, k2_T, k3_T
from mesh.rl.objective import objective_of
from mesh.rl.packing import pack
from mesh.rl.rewards import LengthPenalty, shaped_rewards
from mesh.rl.statistics import rollout_metrics
from mesh.rl.step import StepSettings, advantages_of, counted
from mesh.roles.divergences import reward_divergences
from mesh.types import Outline, Wave


def gradient(estimate, logprobs: list[float], others: list[float]) -> tuple[list, list]:
    """Values and gradients of an estimator of the KL."""
    logprobs_T = torch.tensor(logprobs, dtype=torch.float64, requires_grad=True)
    others_T = torch.tensor(others, dtype=torch.float64, requires_grad=True)
    value_T = estimate(logprobs_T, others_T)
    value_T.sum().backward()
    assert others_T.grad is None
    return value_T.tolist(), logprobs_T.grad.tolist()


def test_estimators_of_the_kl_by_hand():
    two = math.log(2)
    logprobs, others = [-1.0, -1.0, -1.0], [-1.0, -1.0 - two, -1.0 + two]
    assert gradient(k1_T, logprobs, others) == (pytest.approx([0, two, -two]), [1, 1, 1])
    squared = two * two / 2
    assert gradient(k2_T, logprobs, others) == (
        pytest.approx([0, squared, squared]), pytest.approx([0, two, -two]),
    )  # fmt: skip
    assert gradient(k3_T, logprobs, others) == (
        pytest.approx([0, 0.5 + two - 1, 2 - two - 1]), pytest.approx([0, 0.5, -1]),
    )  # fmt: skip


def test_mean_gradients_are_those_that_the_table_of_the_module_gives():
    """Over a whole vocabulary of 6, by logits: k1 none, k2 KL(policy || other), k3 the other."""
    torch.manual_seed(0)
    logits_V, others_V = torch.randn(2, 6, dtype=torch.float64)
    others_V = others_V.log_softmax(0)

    def grad(of) -> torch.Tensor:
        leaf_V = logits_V.clone().requires_grad_()
        return torch.autograd.grad(of(leaf_V.log_softmax(0)), leaf_V)[0]

    def expected(estimate):
        return grad(lambda logp_V: (logp_V.exp().detach() * estimate(logp_V, others_V)).sum())

    reverse_V = grad(lambda logp_V: (logp_V.exp() * (logp_V - others_V)).sum())
    forward_V = grad(lambda logp_V: (others_V.exp() * (others_V - logp_V)).sum())
    torch.testing.assert_close(expected(k1_T), torch.zeros(6).double(), rtol=0, atol=1e-15)
    torch.testing.assert_close(expected(k2_T), reverse_V)
    torch.testing.assert_close(expected(k3_T), forward_V)
    assert not torch.allclose(reverse_V, forward_V, rtol=0.1)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_kl_is_added_to_any_loss(name, estimator):
    batch, loss = batch_of(0.5), LOSSES[name]
    if loss.teacher_coef > 0:
        pytest.skip("a loss of a teacher has tests of its own")
    plain, weighted = (
        objective_of(loss, kl_coef=coef, kl_estimator=estimator) for coef in (0.0, 0.25)
    )
    terms = weighted(batch.packed())
    estimate = {"k2": k2_T, "k3": k3_T}[estimator]
    tokens = batch.packed()
    expected_T = 0.25 * estimate(tokens.logprobs_T, tokens.reference_logprobs_T)
    torch.testing.assert_close(terms.loss_T - plain(tokens).loss_T, expected_T)
    # the metric is one estimate, whichever is trained with
    kl_T = k3_T(tokens.logprobs_T, tokens.reference_logprobs_T)
    torch.testing.assert_close(terms.measured["kl"], kl_T)


def test_a_kl_in_the_reward_is_none_of_the_loss():
    batch = batch_of(0.5)
    inside = objective_of(LOSSES["grpo"], kl_coef=0.5, kl_in="reward", kl_estimator="k1")
    assert inside.needs == {"reference_logprobs"}
    plain = objective_of(LOSSES["grpo"])(batch.packed())
    assert torch.equal(inside(batch.packed()).loss_T, plain.loss_T)


def outlines(*rewards_and_lengths: tuple[float, int], group: int = 2) -> Wave:
    return Wave(
        [
            Outline(i // group, i % group, length, length + 3, reward, "stop")
            for i, (reward, length) in enumerate(rewards_and_lengths)
        ],
        [],
    )


def test_the_soft_overlong_punishment_by_hand():
    """DAPO's numbers in small: a limit of 20 tokens, the last 4 of which are the ramp."""
    penalty = LengthPenalty(1.0, 4, 20)
    lengths = torch.tensor([0, 1, 16, 17, 18, 19, 20, 21, 100])
    assert penalty.of(lengths).tolist() == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert LengthPenalty(0.5, 20, 20).of(torch.tensor([0, 10, 20])).tolist() == [0, 0.25, 0.5]


def test_a_penalty_is_in_the_advantages_and_groups_are_equal_without_it():
    """Both rollouts of the second group are right, one is long: it teaches, and counts as equal."""
    wave = outlines((1, 4), (0, 8), (1, 4), (1, 8))
    objective = objective_of(LOSSES["dr_grpo"], length_penalty=LengthPenalty(1.0, 4, 8))
    assert shaped_rewards(wave, 2, objective.length_penalty).tolist() == [[1, -1], [1, 0]]
    assert advantages_of(wave, objective, 2) == {0: [1.0, -1.0], 1: [0.5, -0.5]}
    assert equal_groups(rewards_of(wave, 2)).tolist() == [False, True]
    keys = StepSettings(2, 2, 1, drop_equal_groups=True, pass_tokens=99)
    assert {o.prompt_id for o in counted(wave, keys)} == {0}
    metrics = rollout_metrics([wave, wave], 2, objective.length_penalty)
    assert metrics["reward/mean"] == 0.75 and metrics["equal_groups"] == 0.5
    assert (metrics["length_penalty/mean"], metrics["length_penalty/share"]) == (0.5, 0.5)
    assert "length_penalty/mean" not in rollout_metrics([wave], 2)


def test_rewards_are_less_by_the_kl_before_they_are_compared():
    wave = outlines((1, 4), (0, 8), (1, 4), (1, 8))
    objective = objective_of(LOSSES["rloo"])
    kls = {(0, 0): 0.5, (0, 1): -0.5}  # the other group was left out, and not scored
    assert shaped_rewards(wave, 2, None, kls).tolist() == [[0.5, 0.5], [1, 1]]
    assert advantages_of(wave, objective, 2, kls) == {0: [0.0, 0.0], 1: [0.0, 0.0]}
    with pytest.raises(AssertionError, match="half a group was scored"):
        shaped_rewards(wave, 2, None, {(0, 0): 0.5})


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_kl_of_rollouts_is_the_sum_over_their_tokens_however_they_are_packed(
    solo_mesh, estimator
):
    """Of the logprobs that the rollouts carry, against those of the reference."""
    words = ["kl_coef=0.5", "kl_in=reward", f"kl_estimator={estimator}"]
    conf, share = conf_of(*words), some_leaves()
    trainer, objective = trainer_of(conf), objective_for(conf)
    found = []
    for max_tokens in (4096, 1):
        passes = [*passes_in(share, max_tokens), []]
        scores = trainer.score(passes, objective.needs)
        found.append(reward_divergences(passes, scores, objective, trainer.cpu_group))
    assert len(found[0]) == 4 and found[0] == pytest.approx(found[1], rel=1e-5)
    (known,) = trainer.score(passes_in(share), objective.needs)
    batch, rollouts = pack(share), [r for leaf in share for r in leaf.rollouts]
    values_A = {"k1": k1_T, "k2": k2_T, "k3": k3_T}[estimator](
        batch.old_logprobs_A.double(), known.reference_logprobs_A.double()
    )
    for number, rollout in enumerate(rollouts):
        expected = 0.5 * float(values_A[batch.sequence_A == number].sum())
        assert found[0][rollout.key] == pytest.approx(expected, rel=1e-12) != 0
    plain = objective_for(conf_of("kl_coef=0.5"))
    assert reward_divergences(passes, scores, plain, trainer.cpu_group) is None


def test_importance_by_hand():
    """Ratios 2, 1/2 and 8 of one sequence, whose product is 8, and 1 of another."""
    ratios_T = torch.tensor([2.0, 0.5, 8.0, 1.0], dtype=torch.float64)
    generator_T, sequence_T = torch.full_like(ratios_T, -5), torch.tensor([0, 0, 0, 1])
    trainer_T = (generator_T + ratios_T.log()).requires_grad_()

    def weights(kind, level, low, high):
        found = Importance(kind, level, low, high).weights(trainer_T, generator_T, sequence_T)
        assert not found[0].requires_grad
        return [round(x, 12) for x in found[0].tolist()], found[1].tolist()

    yes, no = True, False
    assert weights("tis", "token", 0.0, 4.0) == ([2, 0.5, 4, 1], [no, no, yes, no])
    assert weights("tis", "token", 0.75, 4.0) == ([2, 0.75, 4, 1], [no, yes, yes, no])
    assert weights("mask", "token", 0.75, 4.0) == ([2, 0, 0, 1], [no, yes, yes, no])
    assert weights("tis", "sequence", 0.0, 4.0) == ([4, 4, 4, 1], [yes, yes, yes, no])
    assert weights("mask", "sequence", 0.5, 4.0) == ([0, 0, 0, 1], [yes, yes, yes, no])
    assert weights("mask", "sequence", 0.5, 9.0) == ([8, 8, 8, 1], [no] * 4)


@pytest.mark.parametrize("name", ["grpo", "rloo", "gspo", "cispo", "sapo"])
def test_importance_weighs_any_loss_and_not_the_kl(name):
    batch = batch_of(0.5)
    importance = Importance("tis", "token", 0.0, 1.1)
    terms = {"kl_coef": 0.25, "importance": importance}
    tokens = batch.packed()
    plain, found = (objective_of(LOSSES[name], **one)(tokens) for one in ({}, terms))
    weights_T, bounded_T = importance.weights(
        tokens.old_logprobs_T, tokens.generator_logprobs_T, tokens.sequence_T
    )
    kl_T = k3_T(tokens.logprobs_T, tokens.reference_logprobs_T)
    torch.testing.assert_close(found.loss_T, plain.loss_T * weights_T + 0.25 * kl_T)
    assert torch.equal(found.measured["importance/weight"], weights_T)
    assert torch.equal(found.measured["importance/bounded"], bounded_T) and bounded_T.any()


def test_nothing_is_weighed_where_generator_and_trainer_agree():
    batch = batch_of(0.5)
    batch = replace(batch, other_BL=batch.old_BL)
    plain = objective_of(LOSSES["grpo"])
    for level in ("token", "sequence"):
        for kind in ("tis", "mask"):
            objective = objective_of(LOSSES["grpo"], importance=Importance(kind, level, 1.0, 1.0))
            ours, theirs = (loss_of(one, batch) for one in (objective, plain))
            assert torch.equal(ours, theirs)
            assert torch.equal(gradient_of(ours, batch), gradient_of(theirs, batch))


def test_the_ratio_of_an_only_update_is_1_where_importance_corrects_the_generator(solo_mesh):
    """The old logprobs are then the trainer's, and the weights those against the generator."""
    conf, share = conf_of("importance=tis", "importance_high=1.05"), some_leaves()
    trainer, objective = trainer_of(conf), objective_for(conf)
    assert objective.needs == {"trainer_logprobs"}
    logprobs_A, _ = accumulate(trainer, passes_in(share), objective)
    metrics = trainer.update(4.0, num_tokens(share))
    batch = pack(share)
    assert metrics["ratio/max"] == metrics["ratio/mean"] == 1
    assert metrics["logprob_diff/max"] > 0.1 and metrics["clip_fraction"] == 0
    weights_A = (logprobs_A - batch.generator_logprobs_A).exp()
    expected = float(weights_A.clamp(0, 1.05).mean())
    assert metrics["importance/weight"] == pytest.approx(expected, rel=1e-6)
    assert metrics["importance/bounded"] == float((weights_A > 1.05).double().mean()) > 0
    loss_A = -weights_A.clamp(0, 1.05) * batch.advantages_A * batch.weights_A
    assert metrics["loss"] == pytest.approx(float(loss_A.sum()) / 4, rel=1e-6)


REFUSALS = {  # words, and the beginnings of all lines
    "k1 in the loss": (
        ["kl_coef=0.1", "kl_estimator=k1"],
        ["kl_estimator=k1: in the loss its gradient is that of the logprob alone, which is 0 on "
         "average over what the policy samples: no pull towards the reference; use k2 or k3, or "
         "set kl_in=reward"],
    ),
    "a KL that nothing weighs": (
        ["kl_in=reward", "kl_estimator=k2"],
        ["kl_estimator=k2: kl_coef=0 weighs no KL; set kl_coef=0.01 or so",
         "kl_in=reward: kl_coef=0 weighs no KL; set kl_coef=0.01 or so"],
    ),
    "a KL of what is masked": (
        ["kl_coef=0.1", "kl_in=reward", "truncated=mask"],
        ["kl_in=reward: responses that are masked are not scored by the reference, but"],
    ),
    "a dual clip of cispo": (
        ["loss=cispo", "dual_clip=3"],
        ["dual_clip=3.0: loss=cispo has no such bound, as it bounds every large ratio by itself; "
         "leave it out, or use one of grpo, dr_grpo, bnpo, dapo, rloo, reinforce_pp, "],
    ),
    "a dual clip of sapo": (
        ["loss=sapo", "dual_clip=3"],
        ["dual_clip=3.0: loss=sapo has no such bound, as it bounds every large ratio by itself; "],
    ),
    "a dual clip below the clip": (
        ["loss=dapo", "dual_clip=1.25"],
        ["dual_clip=1.25: it has to be above 1 + clip_high=1.28, where clipping begins; use "],
    ),
    "bounds of tokens for sequences": (
        ["loss=gspo", "clip_high=0.2", "clip_low=0.2"],
        ["clip_low=0.2: the ratio of loss=gspo is the mean of a sequence, which hardly leaves 1: a "
         "bound for the ratios of tokens never clips it; use less than 0.1, e.g. 0.0003, or "
         "loss=grpo or dapo",
         "clip_high=0.2: the ratio of loss=gspo is the mean of a sequence, which hardly leaves 1:"],
    ),
    "a dual clip of tokens for sequences": (
        ["loss=gspo", "dual_clip=3"],
        ["dual_clip=3.0: the ratio of loss=gspo is the mean of a sequence, which hardly leaves 1: "
         "a bound for the ratios of tokens never clips it; use less than 1.1, e.g. 1.01, or "
         "loss=grpo or dapo"],
    ),
    "a lower bound of cispo": (
        ["loss=cispo", "clip_low=0.2"],
        ["clip_low=0.2: loss=cispo has no such bound; leave it out"],
    ),
    "the statistics of a step that is cut": (
        ["loss=reinforce_pp", "waves=2"],
        ["waves=2: loss=reinforce_pp needs the rewards of the whole step before the first backward "
         "pass; set waves=1"],
    ),
    "the same by the key": (
        ["advantage=centred_whitened", "waves=2"],
        ["waves=2: advantage=centred_whitened needs the rewards of the whole step"],
    ),
    "equal groups that teach": (
        ["loss=reinforce_pp", "drop_equal_groups=true"],
        ["drop_equal_groups=true: with advantage=whitened groups of equal rewards teach too, as"],
    ),
    "rewards below 0 with their mean": (
        ["loss=max_rl", "length_penalty=1", "length_penalty_tokens=2", "truncated_reward=-1",
         "kl_coef=0.1", "kl_in=reward"],
        ["length_penalty=1.0: it takes rewards below 0, and the advantage divides by their mean, ",
         "kl_in=reward: it takes rewards below 0,", "truncated_reward=-1.0: it takes rewards"],
    ),
    "importance of what is exact": (
        ["importance=mask", "batch_invariant=true"],
        ["importance=mask: with batch_invariant=true trainer and generator have equal bits: every "
         "ratio is 1; leave it out, or set batch_invariant=false"],
    ),
    "bounds of no importance": (
        ["importance_level=sequence", "importance_high=3", "importance_low=0.5"],
        ["importance_level=sequence: importance=none corrects nothing; leave it out, or set",
         "importance_low=0.5: importance=none", "importance_high=3.0: importance=none"],
    ),
    "a mask with nothing between its bounds": (
        ["importance=mask", "importance_high=1"],
        ["importance_high=1.0: with importance_low=1 only ratios of exactly 1 are left; use e.g."],
    ),
    "a penalty without its ramp": (
        ["length_penalty=1"],
        ["length_penalty_tokens is not set: length_penalty needs the length of its ramp; set it to "
         "a part of 8, e.g. 1"],
    ),
    "a ramp longer than a response": (
        ["length_penalty=1", "length_penalty_tokens=9"],
        ["length_penalty_tokens=9: the ramp is longer than the responses at its end, which have 8"],
    ),
    "a ramp without a penalty": (
        ["length_penalty_tokens=2", "length_penalty_limit=6"],
        ["length_penalty_tokens=2: length_penalty=0 takes nothing off; leave it out, or set",
         "length_penalty_limit=6: length_penalty=0 takes nothing off"],
    ),
    "several at once": (
        ["loss=gspo", "clip_high=0.2", "importance_high=3", "kl_in=reward", "advantage=whitened",
         "waves=2"],
        ["waves=2: ", "clip_high=0.2: ", "kl_in=reward: ", "importance_high=3.0: "],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_terms_that_make_no_sense_are_refused_together(case):
    words, expected = REFUSALS[case]
    with pytest.raises(ValueError) as caught:
        read_loss(conf_of(*words))
    lines = str(caught.value).splitlines()
    assert len(lines) == len(expected), lines
    for line, beginning in zip(lines, expected, strict=True):
        assert line.startswith(beginning), line


def test_terms_that_fit_are_taken():
    for words in (
        ["loss=rloo", "kl_coef=0.05", "kl_in=reward"],
        ["loss=rloo", "clip_high=0.2", "dual_clip=3"],
        ["loss=cispo", "clip_high=3", "kl_coef=0.1", "kl_estimator=k2"],
        ["loss=gspo", "dual_clip=1.02", "clip_high=0.01", "aggregation=sum"],
        ["loss=dapo", "length_penalty=1", "length_penalty_tokens=3", "length_penalty_limit=7"],
        ["loss=sapo", "loss_args.tau_negative=2", "importance=tis", "importance_level=sequence"],
        ["loss=max_rl", "kl_coef=0.1", "truncated_reward=0"],
        ["loss=reinforce_pp_baseline", "drop_equal_groups=true", "kl_coef=0.1", "kl_in=reward"],
    ):
        read_loss(conf_of(*words))


def test_the_terms_of_a_configuration():
    conf = conf_of(
        "importance=mask", "importance_high=4", "kl_coef=0.1", "kl_in=reward",
        "length_penalty=0.5", "length_penalty_tokens=3",
    )  # fmt: skip
    objective = objective_for(conf)
    assert objective.importance == Importance("mask", "token", 0.25, 4.0)
    assert objective.length_penalty == LengthPenalty(0.5, 3, 8)
    assert (objective.kl_in, objective.kl_estimator) == ("reward", "k1")
    assert objective_for(conf_of("kl_coef=0.1")).kl_estimator == "k3"
    assert objective_for(conf_of("importance=tis")).importance.low == 0
    assert objective_for(conf_of()).importance is objective_for(conf_of()).length_penalty is None
