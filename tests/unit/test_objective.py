"""Losses by name, a user's own among them: settings, refusals, needs, and what is trained with."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from small_trainer import (
    accumulate,
    conf_of,
    num_tokens,
    objective_for,
    passes_in,
    settings_of,
    some_leaves,
    trainer_of,
)

from mesh.config.schema import Conf
from mesh.program.assembly import check
from mesh.program.loss_checks import read_loss
from mesh.rl.advantages import group_advantages
from mesh.rl.loading import load_loss
from mesh.rl.losses import LOSSES, Loss, LossTokens, TokenLoss, clipped_surrogate, kl_T
from mesh.rl.objective import Objective, objective_of
from mesh.rl.packing import PackedBatch, pack
from mesh.rl.statistics import stats_metrics, token_stats
from mesh.roles.gradients import summed_gradients
from mesh.roles.passes import PassScores


def nothing_clipped(loss_T: torch.Tensor) -> TokenLoss:
    return TokenLoss(loss_T, torch.zeros_like(loss_T, dtype=torch.bool))


def powered(tokens: LossTokens, *, scale: float = 1.0, power: int = 1, name: str = "a"):
    """A loss of a user: -scale * A^power * logprob."""
    return nothing_clipped(-scale * tokens.advantages_T**power * tokens.logprobs_T)


def by_strength(tokens: LossTokens, *, strength: float, clip_high: float) -> TokenLoss:
    """No setting has a default."""
    return nothing_clipped(tokens.logprobs_T * strength * clip_high)


def towards_reference(tokens: LossTokens) -> torch.Tensor:
    """Advantages of single tokens: less where the reference finds the token unlikely."""
    assert tokens.reference_logprobs_T is not None
    return tokens.advantages_T + 0.5 * tokens.reference_logprobs_T


POWERED = Loss(powered, advantage="centred", aggregation="token", settings={"power": 2})
STRENGTH = Loss(by_strength)
STRONG = Loss(by_strength, settings={"strength": 2.0})
CREDITED = Loss(powered, needs=frozenset({"reference_logprobs"}), credit=towards_reference)
UNKNOWN = Loss(powered, needs=frozenset({"entropy_gradients", "reference_logprobs"}))
WHOLE_STEP = Loss(powered, needs=frozenset({"step_statistics"}))
AGAINST_GENERATOR = Loss(
    lambda tokens: nothing_clipped(tokens.logprobs_T - tokens.generator_logprobs_T)
)
UNDECLARED = Loss(powered, credit=towards_reference)
MEAN = Loss(lambda tokens: nothing_clipped(tokens.logprobs_T.mean()))
UNTYPED = Loss(lambda tokens: TokenLoss(tokens.logprobs_T, tokens.logprobs_T))
RAISING = Loss(lambda tokens: {}["nowhere"])
ROWS = Loss(powered, advantage=lambda rewards_PG: rewards_PG.mean(1))
HERE = __name__


def tokens_of(*advantages: float, **more: torch.Tensor) -> LossTokens:
    """Tokens of one sequence with logprobs -1, -2, ... and old ones 0.5 below, above, below ..."""
    numbers_T = torch.arange(1.0, len(advantages) + 1)
    old_T = -numbers_T + 0.5 * (-1) ** numbers_T
    sequence_T = torch.zeros(len(advantages), dtype=torch.int64)
    return LossTokens(-numbers_T, old_T, torch.tensor(advantages), sequence_T, **more)


def ppo(logprobs_T, old_T, advantages_T, clip_low: float, clip_high: float) -> torch.Tensor:
    """PPO's clipped surrogate written out (arXiv:1707.06347, eq. 7)."""
    ratio_T = torch.exp(logprobs_T - old_T)
    bounded_T = torch.clamp(ratio_T, 1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio_T * advantages_T, bounded_T * advantages_T)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.detach().contiguous().view(torch.int32)


@pytest.mark.parametrize(
    ("words", "bounds"),
    [
        ([], (0.2, 0.2)),
        (["clip_high=0.28"], (0.2, 0.28)),
        (["clip_low=0.1", "clip_high=0.3"], (0.1, 0.3)),
        (["clip_low=0"], (0.0, 0.2)),
    ],
)
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "bnpo", "reinforce_pp", "max_rl"])
def test_the_clipped_losses_have_the_bits_of_ppo_and_bounds_of_0_2_unless_set(name, words, bounds):
    torch.manual_seed(3)
    logprobs_T, old_T, advantages_T = torch.randn(3, 2000) / 3
    conf = conf_of(f"loss={name}", *words)
    assert (conf.clip_low is None) == ("clip_low" not in " ".join(words))
    tokens = LossTokens(logprobs_T, old_T, advantages_T, torch.zeros(2000, dtype=torch.int64))
    loss_T, clipped_T, measured = objective_for(conf)(tokens)
    assert torch.equal(bits(loss_T), bits(ppo(logprobs_T, old_T, advantages_T, *bounds)))
    assert 100 < int(clipped_T.sum()) < 1900 and measured == {}


def test_the_rows_of_the_table_are_the_papers():
    """Advantage, average and divisor of GRPO and of Dr. GRPO, and the keys that refine them."""
    rewards_PG, lengths_R = torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([4, 2])
    kinds = {"grpo": "std", "dr_grpo": "centred"}
    for name, kind in kinds.items():
        objective = objective_for(conf_of(f"loss={name}"))
        expected_PG = group_advantages(rewards_PG, kind)
        assert torch.equal(objective.advantages(rewards_PG), expected_PG)
        assert objective.needs == frozenset()
        other = objective_for(conf_of(f"loss={name}", f"advantage={kinds['dr_grpo']}"))
        assert torch.equal(other.advantages(rewards_PG), group_advantages(rewards_PG, "centred"))
    grpo, dr_grpo = (objective_for(conf_of(f"loss={name}")) for name in kinds)
    assert grpo.weights(lengths_R).tolist() == [0.25, 0.5]
    assert dr_grpo.weights(lengths_R).tolist() == [1.0, 1.0]
    assert (grpo.normaliser(6, 2), dr_grpo.normaliser(6, 2)) == (2.0, 2.0 * 8)
    as_in_trl = objective_for(conf_of("advantage_eps=1e-4")).advantages(rewards_PG)
    assert torch.equal(as_in_trl, group_advantages(rewards_PG, "std", 1e-4))
    assert not torch.equal(as_in_trl, group_advantages(rewards_PG, "std"))
    by_token = objective_for(conf_of("aggregation=token"))
    assert (by_token.normaliser(6, 2), by_token.weights(lengths_R).tolist()) == (6.0, [1.0, 1.0])


def test_a_loss_of_the_users_own_is_named_by_module_and_takes_its_settings():
    conf = conf_of(f"loss={HERE}:POWERED", "loss_args.scale=0.5", "loss_args.power=3")
    assert read_loss(conf) is POWERED
    objective = objective_for(conf)
    tokens = tokens_of(2.0, -1.0)
    assert objective(tokens).loss_T.tolist() == [0.5 * 8 * 1, 0.5 * -1 * 2]
    # what is not given: the row's settings, then the function's defaults
    assert objective_for(conf_of(f"loss={HERE}:POWERED"))(tokens).loss_T.tolist() == [4.0, 2.0]
    rewards_PG = torch.tensor([[0.0, 2.0]])
    assert objective.advantages(rewards_PG).tolist() == [[-1.0, 1.0]]
    strong = objective_for(conf_of(f"loss={HERE}:STRONG", "clip_high=0.5"))
    assert strong(tokens).loss_T.tolist() == [-1.0, -2.0]


def test_an_advantage_may_be_a_function_of_the_rewards():
    doubled = objective_of(Loss(powered, advantage=lambda rewards_PG: 2 * rewards_PG))
    assert doubled.advantages(torch.tensor([[1.0, 3.0]])).tolist() == [[2.0, 6.0]]
    rewards_PG = torch.tensor([[16777217.0, 1e39]], dtype=torch.float64)
    above = objective_of(Loss(powered, advantage=lambda rewards_PG: rewards_PG - 16777216))
    advantages_PG = above.advantages(rewards_PG[:, :1])
    assert advantages_PG.tolist() == [[1.0]] and advantages_PG.dtype == torch.float32
    with pytest.raises(ValueError, match="the advantage 1e[+]39 is beyond float32"):
        above.advantages(rewards_PG)


AS_PYTHON = "give one, with numbers as Python writes them"
REFUSALS = {  # words, and all lines
    "misspelt": (
        ["loss=grppo"],
        ["loss=grppo: no such loss; did you mean grpo? use one of grpo, dr_grpo, bnpo, dapo, rloo, "
         "reinforce_pp, reinforce_pp_baseline, gspo, cispo, sapo, max_rl, distill, or MODULE:NAME "
         "for a loss of your own"],
    ),
    "half a name": (
        ["loss=:POWERED"],
        ["loss=:POWERED: write it as MODULE:NAME, e.g. my_losses:UNCLIPPED"],
    ),
    "no such module": (
        ["loss=not_there_at_all:X"],
        ["loss=not_there_at_all:X: cannot import not_there_at_all (No module named "
         "'not_there_at_all'); install it, or put its directory on PYTHONPATH"],
    ),
    "no Loss": (
        [f"loss={HERE}:powered"],
        [f"loss={HERE}:powered: powered is no mesh.rl.losses.Loss of {HERE}; it has POWERED, "
         "STRENGTH, STRONG, CREDITED, UNKNOWN, WHOLE_STEP, AGAINST_GENERATOR, UNDECLARED, MEAN, "
         "UNTYPED, RAISING, ROWS"],
    ),
    "no such name": (
        ["loss=mesh.rl.losses:GRPO"],
        ["loss=mesh.rl.losses:GRPO: GRPO is no mesh.rl.losses.Loss of mesh.rl.losses; it has "
         "CROSS_ENTROPY"],
    ),
    "no such setting": (
        [f"loss={HERE}:POWERED", "loss_args.scal=2"],
        [f"loss_args.scal=2: loss={HERE}:POWERED has no such setting; it takes scale, power, name"],
    ),
    "no settings": (
        ["loss_args.scale=2"],
        ["loss_args.scale=2: loss=grpo has no such setting; it takes none"],
    ),
    "wrong types": (
        [f"loss={HERE}:POWERED", "loss_args.scale=fast", "loss_args.power=1.5", "loss_args.name=3"],
        [f"loss_args.scale=fast: cannot be read as float; {AS_PYTHON}",
         f"loss_args.power=1.5: cannot be read as int; {AS_PYTHON}"],
    ),
    "a flag for a number": (
        [f"loss={HERE}:POWERED", "loss_args.scale=true", "loss_args.power=false"],
        [f"loss_args.scale=true: cannot be read as float; {AS_PYTHON}",
         f"loss_args.power=false: cannot be read as int; {AS_PYTHON}"],
    ),
    "a text in quotes": (
        [f"loss={HERE}:POWERED", "loss_args.power='2'"],
        ["loss_args.power='2': expected int, got str"],
    ),
    "missing": (
        [f"loss={HERE}:STRENGTH"],
        [f"loss_args.strength is missing: loss={HERE}:STRENGTH needs it; write "
         "loss_args.strength=VALUE",
         f"clip_high is missing: loss={HERE}:STRENGTH needs it; write clip_high=VALUE"],
    ),
    "null is missing": (
        [f"loss={HERE}:STRENGTH", "loss_args.strength=null", "clip_high=1"],
        [f"loss_args.strength is missing: loss={HERE}:STRENGTH needs it; write "
         "loss_args.strength=VALUE"],
    ),
    "bounds of a loss without them": (
        [f"loss={HERE}:POWERED", "clip_low=0.1"],
        [f"clip_low=0.1: loss={HERE}:POWERED has no such bound; leave it out"],
    ),
    "a key of the run": (
        ["loss_args.clip_low=0.1"],
        ["loss_args.clip_low=0.1: this is a key of the run; write clip_low=0.1"],
    ),
    "unmet needs": (
        [f"loss={HERE}:UNKNOWN"],
        [f"loss={HERE}:UNKNOWN: needs entropy_gradients, which this trainer does not compute; use "
         "a loss whose needs are among entropy_gradient, reference_logprobs, sequence_ratio, "
         "step_statistics, teacher_kl, teacher_logprobs, trainer_logprobs"],
    ),
    "an eps without a division": (
        ["loss=dr_grpo", "advantage_eps=1e-4"],
        ["advantage_eps=0.0001: the advantage is centred, which does not divide by a deviation "
         "or mean; leave it out, or set advantage=std"],
    ),
    "an eps of a loss with a function of its own": (
        [f"loss={HERE}:ROWS", "advantage_eps=0"],
        ["advantage_eps=0.0: the advantage is the loss's own function, which does not divide by a "
         "deviation or mean; leave it out, or set advantage=std"],
    ),
    "the step in one wave": (
        [f"loss={HERE}:WHOLE_STEP", "waves=2"],
        [f"waves=2: loss={HERE}:WHOLE_STEP needs the rewards of the whole step before the first "
         "backward pass; set waves=1"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_fit_a_loss_is_refused_with_key_and_remedy(case):
    words, expected = REFUSALS[case]
    with pytest.raises(ValueError) as caught:
        read_loss(conf_of(*words))
    assert str(caught.value).splitlines() == expected


def test_what_fits_is_taken():
    for words in (
        [f"loss={HERE}:POWERED", "loss_args.scale=2"],  # an integer is a number
        [f"loss={HERE}:STRENGTH", "loss_args.strength=0.5", "clip_high=0.1"],
        [f"loss={HERE}:WHOLE_STEP"],
        [f"loss={HERE}:CREDITED", "waves=2"],
        [f"loss={HERE}:AGAINST_GENERATOR"],
        ["loss=dr_grpo", "advantage=std", "advantage_eps=1e-4"],
    ):
        assert isinstance(read_loss(conf_of(*words)), Loss)


ONE = "return one loss and one bool per token"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("MEAN", ["loss_T of shape () and clipped_T of shape () and torch.bool for 99", ONE]),
        ("UNTYPED", ["loss_T of shape (99,) and clipped_T of shape (99,) and torch.float32", ONE]),
        (
            "RAISING",
            [
                "its surrogate, for 99 tokens raised KeyError: 'nowhere' (",
                "test_objective.py, line ",
            ],
        ),
        ("UNDECLARED", ["its surrogate, for 99 tokens raised AssertionError"]),
        ("ROWS", ["its advantage gave shape (3,) for rewards of (3, 8); return one advantage per"]),
    ],
)
def test_a_loss_that_fails_on_a_few_tokens_is_refused_before_the_run(name, parts):
    with pytest.raises(ValueError) as caught:
        read_loss(conf_of(f"loss={HERE}:{name}"))
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"loss={HERE}:{name}: ")
    assert [part for part in parts if part not in line] == []


def test_a_loss_is_refused_where_it_is_made_with_an_unknown_advantage_or_average():
    with pytest.raises(ValueError, match="advantage='median': give a function, or one of std, ce"):
        Loss(powered, advantage="median")
    with pytest.raises(ValueError, match="aggregation='mean': give one of token, sequence, sum, "):
        Loss(powered, aggregation="mean")


def test_problems_of_a_loss_are_listed_with_all_others(process):
    conf = conf_of("loss=dr_grp", "num_prompts=63", "waves=2", "loss_args.x=1")
    with pytest.raises(ValueError) as caught:
        check(conf, process)
    title, *lines = str(caught.value).splitlines()
    assert title == "2 problems with the configuration:"
    assert lines[0].startswith("- loss=dr_grp: no such loss; did you mean dr_grpo?")
    assert lines[1].startswith("- num_prompts=63: ")


def test_the_kl_is_added_with_its_weight_and_measured_where_the_reference_is_known():
    reference_T = torch.tensor([-1.5, -1.0, -3.0])
    tokens = tokens_of(1.0, -1.0, 2.0, reference_logprobs_T=reference_T)
    plain = objective_for(conf_of())
    weighted = objective_for(conf_of("kl_coef=0.3"))
    assert (plain.needs, weighted.needs) == (frozenset(), {"reference_logprobs"})
    expected_T = kl_T(tokens.logprobs_T, reference_T)
    without, with_kl = plain(tokens), weighted(tokens)
    assert torch.equal(with_kl.loss_T, without.loss_T + 0.3 * expected_T)
    for terms in (with_kl, without):
        assert list(terms.measured) == ["kl"] and torch.equal(terms.measured["kl"], expected_T)
    assert torch.equal(without.clipped_T, with_kl.clipped_T)
    with pytest.raises(AssertionError, match="reference was not scored"):
        weighted(replace(tokens, reference_logprobs_T=None))


def test_credit_gives_each_token_its_advantage_and_gets_no_gradient():
    reference_T = torch.tensor([-4.0, -2.0, -1.0], requires_grad=True)
    tokens = tokens_of(1.0, 1.0, 1.0, reference_logprobs_T=reference_T)
    logprobs_T = tokens.logprobs_T.clone().requires_grad_()
    loss_T, _, _ = Objective(CREDITED)(replace(tokens, logprobs_T=logprobs_T))
    credit_T = torch.tensor([-1.0, 0.0, 0.5])
    assert torch.equal(loss_T, -credit_T * logprobs_T)
    loss_T.sum().backward()
    assert torch.equal(logprobs_T.grad, -credit_T) and reference_T.grad is None


@dataclass(frozen=True)
class Trained:
    """One step of the small trainer. scores: what was known of its passes before."""

    metrics: dict[str, float]
    gradients: dict[str, torch.Tensor]
    scores: list[PassScores]
    logprobs_A: torch.Tensor
    batch: PackedBatch


def trained(conf: Conf, objective: Objective | None = None) -> Trained:
    """A pass of all leaves; `objective` in place of the configuration's."""
    trainer, share = trainer_of(conf), some_leaves()
    objective = objective or objective_for(conf)
    passes = passes_in(share)
    known = trainer.score(passes, objective.needs)
    logprobs_A, _ = trainer.accumulate(passes, objective, known)
    gradients = {name: g.clone() for name, g in summed_gradients(trainer.model).items()}
    metrics = trainer.update(4.0, num_tokens(share))
    return Trained(metrics, gradients, known, logprobs_A, pack(share))


def test_a_loss_that_needs_the_reference_is_trained_with_its_credit(solo_mesh):
    """Compared with the same surrogate that is given these advantages."""
    conf = conf_of(f"loss={HERE}:CREDITED")
    assert "reference" in settings_of(conf).frozen and not settings_of(conf_of()).frozen
    mine = trained(conf)
    (known,) = mine.scores
    assert known.reference_logprobs_A is not None
    assert torch.equal(known.reference_logprobs_A, mine.logprobs_A), "the start is the reference"
    credit_A = mine.batch.advantages_A + 0.5 * known.reference_logprobs_A
    assert len(set(credit_A.tolist())) == len(credit_A) == 16
    loss_A = -credit_A * mine.logprobs_A * mine.batch.weights_A
    assert mine.metrics["loss"] == pytest.approx(float(loss_A.sum()) / 4, rel=1e-6)
    given = Objective(Loss(powered, credit=lambda tokens: credit_A))
    other = trained(conf_of(), given)
    assert [one.reference_logprobs_A for one in other.scores] == [None]
    for name, gradient in mine.gradients.items():
        assert torch.equal(gradient, other.gradients[name]), name
    assert float(mine.metrics["grad_norm"]) > 1e-3
    assert mine.metrics["kl"] == 0 and "kl" not in other.metrics


def test_the_kl_of_a_loss_that_only_looks_at_the_reference_is_measured(solo_mesh):
    conf, kls = conf_of(f"loss={HERE}:CREDITED"), []
    trainer, share = trainer_of(conf), some_leaves()
    for _ in range(2):
        accumulate(trainer, passes_in(share), objective_for(conf))
        kls.append(trainer.update(4.0, num_tokens(share))["kl"])
    assert kls[0] == 0 < kls[1]


def other_old(leaves) -> PackedBatch:
    """The batch of these leaves as if it had been scored by a policy in between."""
    batch = pack(leaves)
    moved_A = torch.linspace(-0.3, 0.4, len(batch.old_logprobs_A))
    return replace(batch, old_logprobs_A=batch.old_logprobs_A + moved_A)


def test_the_ratio_is_taken_against_the_old_policy_and_the_mismatch_against_the_generator(
    solo_mesh, monkeypatch
):
    first = trained(conf_of())
    monkeypatch.setattr("mesh.roles.trainer.pack", other_old)
    second = trained(conf_of())
    batch = other_old(some_leaves())
    assert torch.equal(first.logprobs_A, second.logprobs_A)
    ratio_A = (second.logprobs_A - batch.old_logprobs_A).exp()
    mismatch_A = (second.logprobs_A - batch.generator_logprobs_A).abs()
    for name, value_A in (("ratio", ratio_A), ("logprob_diff", mismatch_A)):
        assert second.metrics[f"{name}/max"] == pytest.approx(float(value_A.max()), rel=1e-6)
        assert second.metrics[f"{name}/mean"] == pytest.approx(float(value_A.mean()), rel=1e-6)
        same = first.metrics[f"{name}/max"] == second.metrics[f"{name}/max"]
        assert same == (name == "logprob_diff")
    loss_A = ppo(second.logprobs_A, batch.old_logprobs_A, batch.advantages_A, 0.2, 0.2)
    expected = float((loss_A * batch.weights_A).sum()) / 4
    assert second.metrics["loss"] == pytest.approx(expected, rel=1e-6) != first.metrics["loss"]
    third = trained(conf_of(f"loss={HERE}:AGAINST_GENERATOR"))
    weighted_A = (third.logprobs_A - batch.generator_logprobs_A) * batch.weights_A
    assert third.metrics["loss"] == pytest.approx(float(weighted_A.sum()) / 4, rel=1e-5)


def test_statistics_of_tokens_whose_old_policy_was_not_the_generator():
    sides = [[0.5, 0.25], [0.5, 0.5], [0.125, 0.25]]  # of the trainer, the generator, the old one
    logprobs = [torch.tensor(side, dtype=torch.float64).log() for side in sides]
    metrics = stats_metrics(token_stats(*logprobs, torch.tensor([True, False])))
    assert metrics == pytest.approx({
        "logprob_diff/max": math.log(2), "logprob_diff/mean": math.log(2) / 2,
        "ratio/max": 4.0, "ratio/mean": 2.5, "clip_fraction": 0.5,
    })  # fmt: skip


def test_the_ratio_has_no_gradient_to_the_old_policy():
    old_T = torch.tensor([-1.0, -2.0], requires_grad=True)
    logprobs_T = torch.tensor([-1.1, -2.0], requires_grad=True)
    sequence_T = torch.zeros(2, dtype=torch.int64)
    tokens = LossTokens(logprobs_T, old_T, torch.ones(2), sequence_T)
    clipped_surrogate(tokens).loss_T.sum().backward()
    assert old_T.grad is None and logprobs_T.grad is not None
    assert tokens.ratio_T[1] == 1


def test_a_row_is_what_its_name_loads():
    assert {name: load_loss(name) for name in LOSSES} == LOSSES
    assert load_loss("mesh.rl.losses:CROSS_ENTROPY").surrogate.__name__ == "cross_entropy"
