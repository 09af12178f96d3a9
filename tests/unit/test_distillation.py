"""Entropy bonus and distillation as parts of an objective, and the gradients that they promise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_trainer import conf_of, objective_for
from torch import Tensor

from mesh.program.loss_checks import read_loss
from mesh.rl.losses import DIVERGENCES, LOSSES, LossTokens
from mesh.rl.objective import Terms

TEACHER = "teacher.path=nowhere"


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_tokens(count: int = 40) -> LossTokens:
    """Tokens with every input; the ratio is within the bounds."""
    logprobs_T = -normal(count, seed=0).abs() - 0.1
    return LossTokens(
        logprobs_T.requires_grad_(),
        logprobs_T.detach() + 0.05 * normal(count, seed=1),
        normal(count, seed=2),
        torch.arange(count) // 8,
        generator_logprobs_T=logprobs_T.detach(),
        entropy_T=normal(count, seed=3).abs().requires_grad_(),
        teacher_logprobs_T=-normal(count, seed=4).abs(),
        teacher_kl_T=normal(count, seed=5).abs().requires_grad_(),
    )


def terms_of(*words: str, tokens: LossTokens | None = None) -> Terms:
    return objective_for(conf_of(*words))(some_tokens() if tokens is None else tokens)


ENTROPIC = [name for name in LOSSES if name != "distill"]


@pytest.mark.parametrize("name", ENTROPIC)
def test_the_entropy_is_a_bonus_of_any_loss(name):
    plain, words = terms_of(f"loss={name}"), (f"loss={name}", "entropy_coef=0.03")
    tokens = some_tokens()
    terms = terms_of(*words, tokens=tokens)
    assert torch.equal(terms.loss_T, plain.loss_T - 0.03 * tokens.entropy_T)
    assert torch.equal(terms.clipped_T, plain.clipped_T)
    given = (tokens.entropy_T, tokens.logprobs_T)
    entropy_T, logprobs_T = torch.autograd.grad(terms.loss_T.sum(), given)
    assert torch.equal(entropy_T, torch.full_like(entropy_T, -0.03)) and logprobs_T.any()
    objective = objective_for(conf_of(*words))
    assert objective.needs - objective_for(conf_of(f"loss={name}")).needs == {"entropy_gradient"}


def test_a_bonus_needs_its_entropy():
    with pytest.raises(AssertionError, match="entropy has no gradient"):
        terms_of("entropy_coef=0.1", tokens=replace(some_tokens(), entropy_T=None))


def test_distillation_has_the_detached_difference_as_its_advantage():
    """Written out: ratio * (log p - log q), of which only the ratio has a gradient."""
    zeros_T = torch.zeros_like(some_tokens().advantages_T)
    tokens = replace(some_tokens(), advantages_T=zeros_T, teacher_kl_T=None)
    terms = terms_of("loss=distill", TEACHER, tokens=tokens)
    difference_T = tokens.logprobs_T.detach() - tokens.teacher_logprobs_T
    expected_T = tokens.ratio_T * difference_T
    torch.testing.assert_close(terms.loss_T, expected_T)
    assert torch.equal(terms.measured["teacher_kl"], difference_T)
    found, right = (
        torch.autograd.grad(x_T.sum(), tokens.logprobs_T)[0] for x_T in (terms.loss_T, expected_T)
    )
    torch.testing.assert_close(found, right)
    assert not terms.clipped_T.any()


def test_rewards_are_nothing_to_distillation_alone():
    objective = objective_for(conf_of("loss=distill", TEACHER))
    rewards_PG = normal(3, 4, seed=0).double()
    assert torch.equal(objective.advantages(rewards_PG), torch.zeros(3, 4))
    assert (objective.needs, objective.teacher_coef) == ({"teacher_logprobs"}, 1.0)


@pytest.mark.parametrize("name", ["grpo", "dapo", "cispo", "sapo", "dr_grpo"])
def test_a_teacher_is_added_to_the_advantages_of_a_reward(name):
    tokens = some_tokens()
    terms = terms_of(f"loss={name}", TEACHER, "teacher.coef=0.25", tokens=tokens)
    difference_T = tokens.logprobs_T.detach() - tokens.teacher_logprobs_T
    credited = replace(tokens, advantages_T=tokens.advantages_T - 0.25 * difference_T)
    assert torch.equal(terms.loss_T, terms_of(f"loss={name}", tokens=credited).loss_T)


@pytest.mark.parametrize("name", list(LOSSES))
def test_the_full_kl_is_a_term_with_a_gradient_of_its_own(name):
    words = (f"loss={name}", TEACHER, "teacher.coef=0.25", "teacher.kl=full")
    tokens = replace(some_tokens(), teacher_logprobs_T=None)
    terms = terms_of(*words, tokens=tokens)
    alone = LOSSES[name].surrogate(tokens, **objective_for(conf_of(*words)).settings)
    assert torch.equal(terms.loss_T, alone.loss_T + 0.25 * tokens.teacher_kl_T)
    (kl_T,) = torch.autograd.grad(terms.loss_T.sum(), tokens.teacher_kl_T)
    assert torch.equal(kl_T, torch.full_like(kl_T, 0.25))
    assert torch.equal(terms.measured["teacher_kl"], tokens.teacher_kl_T.detach())
    assert "teacher_kl" in objective_for(conf_of(*words)).needs
    assert "teacher_logprobs" not in objective_for(conf_of(*words)).needs


def mean_gradient(loss_of, logits_V: Tensor, teacher_V: Tensor) -> Tensor:
    """The gradient of a token's loss, on average over the tokens that the policy may draw."""
    total_V = torch.zeros_like(logits_V)
    for token, probability in enumerate(logits_V.softmax(-1).tolist()):
        leaf_V = logits_V.clone().requires_grad_()
        loss = loss_of(leaf_V.log_softmax(-1)[token : token + 1], teacher_V[token : token + 1])
        (gradient_V,) = torch.autograd.grad(loss.sum(), leaf_V)
        total_V += probability * gradient_V
    return total_V


def test_on_average_the_gradient_is_that_of_the_reverse_kl_and_k3s_that_of_the_forward_kl():
    """Over every token of a small vocabulary, in float64."""
    logits_V, teacher_V = normal(9, seed=0).double(), normal(9, seed=1).double().log_softmax(-1)
    objective = objective_for(conf_of("loss=distill", TEACHER))

    def distilled(logprobs_T: Tensor, teacher_T: Tensor) -> Tensor:
        one = torch.zeros(1, dtype=torch.int64)
        return objective(
            LossTokens(
                logprobs_T, logprobs_T.detach(), one.double(), one, teacher_logprobs_T=teacher_T
            )
        ).loss_T

    leaf_V = logits_V.clone().requires_grad_()
    logprobs_V = leaf_V.log_softmax(-1)
    reverse = (logprobs_V.exp() * (logprobs_V - teacher_V)).sum()
    forward = (teacher_V.exp() * (teacher_V - logprobs_V)).sum()
    reverse_V, forward_V = (
        torch.autograd.grad(x, leaf_V, retain_graph=True)[0] for x in (reverse, forward)
    )
    torch.testing.assert_close(mean_gradient(distilled, logits_V, teacher_V), reverse_V)
    torch.testing.assert_close(mean_gradient(DIVERGENCES["k3"], logits_V, teacher_V), forward_V)
    assert (reverse_V - forward_V).abs().max() > 0.01


COEF = "set teacher.coef above 0, or loss=distill, or leave it out"
REFUSALS = {  # words, and the lines
    "no teacher": (
        ["loss=distill"],
        ["teacher.path is not set: loss=distill with a weight of 1 needs a teacher; set "
         "teacher.path=DIRECTORY, a Hugging Face model of the same vocabulary"],
    ),
    "a weight without a teacher": (
        ["teacher.coef=0.5"],
        ["teacher.path is not set: loss=grpo with a weight of 0.5 needs a teacher; set "
         "teacher.path=DIRECTORY, a Hugging Face model of the same vocabulary"],
    ),
    "a teacher that nothing reads": (
        [TEACHER, "teacher.kl=full"],
        [f"teacher.path=nowhere: nothing reads a teacher: loss=grpo does not, and teacher.coef is "
         f"0; {COEF}",
         f"teacher.kl=full: nothing reads a teacher: loss=grpo does not, and teacher.coef is 0; "
         f"{COEF}"],
    ),
    "nothing to learn": (
        ["loss=distill", TEACHER, "teacher.coef=0"],
        ["teacher.coef=0.0: loss=distill learns from the teacher alone; leave it out, or use "
         "another loss"],
    ),
    "a ratio of sequences": (
        ["loss=gspo", TEACHER, "teacher.coef=0.1"],
        ["teacher.kl=sampled: the ratio of loss=gspo is one of a whole sequence, and this KL gives "
         "each of its tokens an advantage of its own; set teacher.kl=full, a term beside any loss, "
         "or use loss=dapo or grpo"],
    ),
    "rewards that nothing learns from": (
        ["loss=distill", TEACHER, "advantage=std", "drop_equal_groups=true", "truncated_reward=-1"],
        [f"{given}: loss=distill learns from the teacher alone, whatever the rewards are; leave it "
         "out, or use a loss of rewards with teacher.coef"
         for given in ("advantage=std", "drop_equal_groups=true", "truncated_reward=-1.0")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_makes_no_sense_is_refused_together(case):
    words, lines = REFUSALS[case]
    with pytest.raises(ValueError) as caught:
        read_loss(conf_of(*words))
    assert str(caught.value).splitlines() == lines


@pytest.mark.parametrize(
    "words",
    [["loss=distill"], ["loss=distill", "teacher.kl=full"], ["teacher.coef=0.1"],
     ["loss=gspo", "teacher.coef=0.1", "teacher.kl=full"], ["loss=distill", "entropy_coef=0.1"]],
)  # fmt: skip
def test_what_makes_sense_passes_the_trial(words):
    assert read_loss(conf_of(TEACHER, *words)) == LOSSES[conf_of(*words).loss]
