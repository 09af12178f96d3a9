"""The start-up trial of losses: a user's functions that couple what a run cuts apart."""

from __future__ import annotations

import math
import re

import pytest
import torch
from small_trainer import conf_of
from torch import Tensor

from mesh.program.loss_checks import read_loss
from mesh.rl.losses import LOSSES, Loss, LossTokens, TokenLoss, clipped_surrogate

HERE = __name__


def surrogate(change):
    """-ratio * A, in which the advantages are changed."""

    def changed(tokens: LossTokens) -> TokenLoss:
        advantages_T = change(tokens)
        return TokenLoss(
            -tokens.ratio_T * advantages_T, torch.zeros_like(advantages_T, dtype=torch.bool)
        )

    return Loss(changed)


def whitened(tokens: LossTokens) -> Tensor:
    a_T = tokens.advantages_T
    return (a_T - a_T.mean()) / (a_T.std() + 1e-6) if len(a_T) > 1 else a_T


def baseline(tokens: LossTokens) -> Tensor:
    """Changes no loss, only the gradient."""
    mean = tokens.logprobs_T.mean() if len(tokens.logprobs_T) else tokens.logprobs_T.sum()
    return tokens.advantages_T * (1 + mean - mean.detach())


def by_sequence(values_T: Tensor, sequence_T: Tensor, num: int) -> Tensor:
    """Sums over the tokens of each sequence."""
    return torch.zeros(num, dtype=values_T.dtype).index_add(0, sequence_T, values_T)


def sequence_ratio(tokens: LossTokens) -> TokenLoss:
    """GSPO's ratio (arXiv:2507.18071): the geometric mean of a sequence, clipped."""
    sequence_T, num = tokens.sequence_T, len(tokens.sequence_T.unique())
    counts_S = by_sequence(torch.ones_like(tokens.logprobs_T), sequence_T, num)
    sums_S = by_sequence(tokens.logprobs_T - tokens.old_logprobs_T, sequence_T, num)
    ratio_T = torch.exp(sums_S / counts_S)[sequence_T]
    return TokenLoss(-ratio_T * tokens.advantages_T, (ratio_T - 1).abs() > 0.2)


def relative_to_first(tokens: LossTokens) -> Tensor:
    """Follows from the place of a sequence in its call."""
    return tokens.advantages_T * (1 + tokens.sequence_T)


def detached(tokens: LossTokens) -> TokenLoss:
    """Has the right value and teaches nothing."""
    loss_T = -(tokens.ratio_T * tokens.advantages_T).detach()
    return TokenLoss(loss_T, torch.zeros_like(loss_T, dtype=torch.bool))


def whitened_where_many(tokens: LossTokens) -> Tensor:
    return whitened(tokens) if len(tokens.ratio_T) > 40 else tokens.advantages_T


def largest(tokens: LossTokens) -> Tensor:
    return tokens.advantages_T * (tokens.ratio_T / tokens.ratio_T.max()).detach()


def largest_or_none(tokens: LossTokens) -> Tensor:
    peak = tokens.advantages_T.abs().amax() if len(tokens.advantages_T) else 1
    return tokens.advantages_T / peak


WHITENED = surrogate(whitened)
WHITENED_WHERE_MANY = surrogate(whitened_where_many)
DETACHED = Loss(detached)
CENTRED = surrogate(lambda t: t.advantages_T - (t.advantages_T.mean() if len(t.ratio_T) else 0))
BY_TOKENS = surrogate(lambda t: t.advantages_T / max(len(t.advantages_T), 1))
BY_SEQUENCES = surrogate(lambda t: t.advantages_T / max(len(t.sequence_T.unique()), 1))
BY_MAXIMUM = surrogate(largest_or_none)
BASELINE = surrogate(baseline)
BY_PLACE = surrogate(relative_to_first)
CREDITED = Loss(clipped_surrogate, credit=whitened)
COUPLED = [
    "WHITENED", "WHITENED_WHERE_MANY", "CENTRED", "BY_TOKENS", "BY_SEQUENCES", "BY_MAXIMUM",
    "BASELINE", "BY_PLACE", "CREDITED",
]  # fmt: skip
RANDOM = surrogate(lambda t: t.advantages_T * torch.rand_like(t.advantages_T))
NOT_EMPTY = surrogate(largest)
GSPO = Loss(sequence_ratio, needs=frozenset({"sequence_ratio"}))


def own_mean(rewards_PG: Tensor) -> Tensor:
    return rewards_PG - rewards_PG.mean(1, keepdim=True)


def batch_std(rewards_PG: Tensor) -> Tensor:
    return own_mean(rewards_PG) / (rewards_PG.std() + 1e-6)


def in_float32(rewards_PG: Tensor) -> Tensor:
    rewards_PG = rewards_PG.float()
    return own_mean(rewards_PG) / (rewards_PG.std(1, keepdim=True) + 1e-6)


def leave_one_out(rewards_PG: Tensor) -> Tensor:
    others_PG = rewards_PG.sum(1, keepdim=True) - rewards_PG
    return rewards_PG - others_PG / (rewards_PG.shape[1] - 1)


MIXING = {
    "deviation": batch_std,
    "mean": lambda rewards_PG: rewards_PG - rewards_PG.mean(),
    "maximum": lambda rewards_PG: own_mean(rewards_PG) / rewards_PG.abs().max(),
    "count": lambda rewards_PG: own_mean(rewards_PG) / len(rewards_PG),
    "transposed": lambda rewards_PG: own_mean(rewards_PG.T.reshape(rewards_PG.shape)),
    "ranks": lambda rewards_PG: rewards_PG.flatten().argsort().argsort().view(rewards_PG.shape),
}
GROUPED = {
    "centred": own_mean,
    "leave one out": leave_one_out,
    "ranks": lambda rewards_PG: rewards_PG.argsort(1).argsort(1).double(),
    "raw": lambda rewards_PG: rewards_PG,
    "constant baseline": lambda rewards_PG: rewards_PG - 0.5,
    "std": lambda rewards_PG: own_mean(rewards_PG) / (rewards_PG.std(1, keepdim=True) + 1e-6),
    "std without eps": lambda rewards_PG: torch.nan_to_num(
        own_mean(rewards_PG) / rewards_PG.std(1, keepdim=True)
    ),
    "float32 without division": lambda rewards_PG: rewards_PG.float() > 0.5,
}


def fault(name: str, *words: str) -> str:
    """The line with which a start refuses the loss of this name; empty: it takes it."""
    try:
        read_loss(conf_of(f"loss={HERE}:{name}", *words))
    except ValueError as error:
        (line,) = str(error).splitlines()
        return line
    return ""


def fault_of(advantage, *words: str, needs=frozenset()) -> str:
    """The same, of an advantage function."""
    globals()["TRY"] = Loss(clipped_surrogate, advantage, needs=frozenset(needs))
    return fault("TRY", *words)


@pytest.mark.parametrize("name", COUPLED)
def test_a_surrogate_that_couples_sequences_is_refused(name):
    line = fault(name)
    assert line.startswith(f"loss={HERE}:{name}: its surrogate gives a token the loss ")
    assert "results would depend on packing, ranks and waves; use no mean" in line


def test_the_refusal_shows_the_losses_of_a_token():
    """Of 99 tokens the loss of one alone is 99 times that; its ratio is exp(-0.6)."""
    beside, alone = re.search(
        r"the loss (\S+) beside other sequences and (\S+) without", fault("BY_TOKENS")
    ).groups()
    assert float(alone) == pytest.approx(-1.5 * math.exp(-0.6), rel=1e-5)
    assert float(beside) == pytest.approx(float(alone) / 99, rel=1e-5)


def test_a_surrogate_without_a_gradient_is_refused():
    assert "its surrogate has no gradient" in fault("DETACHED")


def test_a_surrogate_that_does_not_repeat_is_refused():
    assert "called again with the same tokens; let it follow" in fault("RANDOM")


def test_a_surrogate_that_fails_without_tokens_is_refused():
    """A rank has passes without tokens where another one has more."""
    assert "its surrogate, for 0 tokens raised" in fault("NOT_EMPTY")


@pytest.mark.parametrize("name", [*LOSSES, f"{HERE}:GSPO"])
@pytest.mark.parametrize("words", [[], ["kl_coef=0.1"]])
def test_a_loss_of_tokens_and_their_sequences_is_taken(name, words):
    teacher = ["teacher.path=nowhere"] if name == "distill" else []
    assert isinstance(read_loss(conf_of(f"loss={name}", *words, *teacher)), Loss)


@pytest.mark.parametrize("group_size", [2, 3, 8])
@pytest.mark.parametrize("name", MIXING)
def test_an_advantage_that_mixes_groups_is_refused_unless_it_needs_the_step(name, group_size):
    words = [f"group_size={group_size}"]
    line = fault_of(MIXING[name], *words)
    assert "its advantage gives a rollout" in line
    assert "or give the loss needs=frozenset({'step_statistics'})" in line
    assert fault_of(MIXING[name], *words, needs={"step_statistics"}) == ""
    assert fault_of(MIXING[name], *words, "advantage=std") == ""


@pytest.mark.parametrize("group_size", [2, 3, 8])
@pytest.mark.parametrize("name", GROUPED)
def test_an_advantage_of_its_own_group_is_taken(name, group_size):
    assert fault_of(GROUPED[name], f"group_size={group_size}") == ""


@pytest.mark.parametrize("group_size", [3, 7])
def test_an_advantage_that_divides_rounding_by_itself_is_refused(group_size):
    """Three times 0.1 does not average to 0.1 in float32."""
    line = fault_of(in_float32, f"group_size={group_size}")
    assert "which is rounding; compute it in float64" in line
