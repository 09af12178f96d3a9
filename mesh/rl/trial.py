"""Start-up trial of a loss: what a user's functions give for a few made-up tokens and rewards.

A step is cut into forward passes, ranks and waves, and no number may depend on the cut. So a
token's loss may follow from its own sequence alone, and an advantage from its own group, unless the
loss needs `step_statistics`. Both are tried together and apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mesh.config.user_code import call_user_code
from mesh.rl.losses import LossTokens, Need
from mesh.rl.objective import Objective

LENGTHS = (1, 3, 5, 90)
"""Loss tokens of the sequences. Their means, deviations, largest values and numbers differ; the
last is for functions that do something else where there are many."""

ADVANTAGES = (1.5, -0.75, 0.375, -1.25)
CUT = "results would depend on packing, ranks and waves"


def trial(objective: Objective, group_size: int) -> None:
    """Run an objective on made-up sequences, and its advantages on groups of `group_size`.

    Raises ValueError where user code raises, gives shapes that cannot be trained on, or numbers
    that depend on how a batch is cut.
    """
    try_surrogate(objective)
    if not isinstance(objective.loss.advantage, str):
        try_advantage(objective, group_size)


def try_surrogate(objective: Objective) -> None:
    """The surrogate, with `credit`: all sequences in one call, each alone, and none, as in a pass
    that only keeps ranks in step."""
    everything = range(len(LENGTHS))
    together_XT = results(objective, everything)
    apart_XT = torch.cat([results(objective, [s]) for s in everything], dim=1)
    results(objective, [])
    if not together_XT[2:].any():
        raise ValueError(
            "its surrogate has no gradient: the losses of made-up tokens do not depend on "
            "logprobs_T; compute them from it, without detach(), item() or torch.no_grad()"
        )
    same_T = close(together_XT, apart_XT).all(dim=0)
    if same_T.all():
        return
    if not close(together_XT, results(objective, everything)).all():
        raise ValueError(
            "its surrogate gives other losses when it is called again with the same tokens; let it "
            "follow from its tokens and settings alone: no random numbers, no state"
        )
    token = int((~same_T).nonzero()[0])
    loss = [f"{x_XT[0, token].item():.6g}" for x_XT in (together_XT, apart_XT)]
    raise ValueError(
        f"its surrogate gives a token the loss {loss[0]} beside other sequences and {loss[1]} "
        f"without them, or another gradient: {CUT}; use no mean, deviation, maximum or count over "
        "the tokens of a call, only within a sequence (sequence_T): aggregation averages tokens, "
        "and advantage, which has whole groups, is the place to normalise"
    )


def close(one: Tensor, other: Tensor) -> Tensor:
    """True where numbers are equal up to rounding: that of a sum in another order, in float32."""
    return torch.isclose(one, other, rtol=1e-4, atol=1e-6, equal_nan=True)


def results(objective: Objective, sequences: range | list[int]) -> Tensor:
    """Of every token of these sequences the loss, clipped (0 or 1), and the gradients through
    logprob, entropy and KL to the teacher: five rows."""
    tokens = made_up(objective, sequences)
    loss_T, clipped_T, _ = call_user_code(
        f"its surrogate, for {len(tokens.logprobs_T)} tokens", lambda: objective(tokens)
    )
    through = (tokens.logprobs_T, tokens.entropy_T, tokens.teacher_kl_T)
    gradients = [torch.zeros_like(loss_T) for _ in through]
    if loss_T.requires_grad:
        given = [x_T for x_T in through if x_T is not None]
        found = iter(torch.autograd.grad(loss_T.sum(), given, allow_unused=True))
        there = [None if x_T is None else next(found) for x_T in through]
        gradients = [
            zeros_T if x_T is None else x_T for x_T, zeros_T in zip(there, gradients, strict=True)
        ]
    return torch.stack([loss_T.detach(), clipped_T.to(loss_T.dtype), *gradients])


def made_up(objective: Objective, sequences: range | list[int]) -> LossTokens:
    """Tokens of these of the made-up sequences, as a forward pass that has no others gives them."""
    numbers_T = torch.arange(sum(LENGTHS), dtype=torch.float32)
    sequence_T = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    index_A = torch.cat(
        [torch.zeros(0, dtype=torch.int64), *((sequence_T == s).nonzero()[:, 0] for s in sequences)]
    )
    logprobs_T = -1 - torch.sin(numbers_T)  # from -2 to 0
    old_T = logprobs_T + 0.6 * torch.cos(2 * numbers_T)  # ratios within the bounds and beyond them
    reference_T = logprobs_T - 0.3 * torch.cos(3 * numbers_T)
    teacher_T, kl_T = logprobs_T - 0.4 * torch.cos(5 * numbers_T), 1 + torch.sin(7 * numbers_T)
    entropy_T = 2 + torch.cos(11 * numbers_T)

    def needed(need: Need, x_T: Tensor) -> Tensor | None:
        return x_T[index_A] if need in objective.needs else None

    def followed(need: Need, x_T: Tensor) -> Tensor | None:
        return x_T[index_A].requires_grad_() if need in objective.needs else None

    lengths = torch.tensor([LENGTHS[s] for s in sequences], dtype=torch.int64)
    return LossTokens(
        logprobs_T[index_A].requires_grad_(), old_T[index_A],
        torch.tensor(ADVANTAGES)[sequence_T[index_A]],
        torch.arange(len(lengths)).repeat_interleave(lengths),
        generator_logprobs_T=old_T[index_A],
        entropy_T=followed("entropy_gradient", entropy_T),
        reference_logprobs_T=needed("reference_logprobs", reference_T),
        teacher_logprobs_T=needed("teacher_logprobs", teacher_T),
        teacher_kl_T=followed("teacher_kl", kl_T),
    )  # fmt: skip


def try_advantage(objective: Objective, group_size: int) -> None:
    """The advantage function of a user: all groups in one call, each alone, and equal rewards."""
    numbers_G = torch.arange(group_size, dtype=torch.float64)
    alternating_G = numbers_G % 2
    rewards_PG = torch.stack([alternating_G, 3 - 2 * alternating_G, numbers_G / group_size])
    together_PG = advantages(objective, rewards_PG)
    if "step_statistics" in objective.needs:
        return
    apart_PG = torch.cat([advantages(objective, row_G[None]) for row_G in rewards_PG])
    differs_P = ~close(together_PG, apart_PG).all(dim=1)
    if differs_P.any():
        group = int(differs_P.nonzero()[0])
        first = [f"{x_PG[group, 0].item():.6g}" for x_PG in (together_PG, apart_PG)]
        raise ValueError(
            f"its advantage gives a rollout {first[0]} beside other groups and {first[1]} without "
            "them: results would depend on waves; take statistics over dim 1 of rewards_PG alone, "
            "or give the loss needs=frozenset({'step_statistics'}), for the whole step in one call"
        )
    try_equal(objective, group_size)


def try_equal(objective: Objective, group_size: int) -> None:
    """Equal rewards, for which a function that centres them may give nothing but 0: not the
    rounding of a float32 mean, which it might divide by itself."""

    def largest(rewards_P: Tensor) -> float:
        rewards_PG = rewards_P[:, None].repeat(1, group_size)
        return advantages(objective, rewards_PG).abs().max().item()

    exact_P = torch.tensor([0, 0.5, 1, 2], dtype=torch.float64)
    rounded_P = torch.arange(1, 30, dtype=torch.float64) / 30
    if largest(exact_P) > 0 or (rounding := largest(rounded_P)) == 0:
        return
    raise ValueError(
        "its advantage gives equal rewards of 0, 0.5, 1 or 2 an advantage of 0, and those of 1/30, "
        f"2/30, ... up to {rounding:.3g}, which is rounding; compute it in float64, in which it "
        "gets the rewards"
    )


def advantages(objective: Objective, rewards_PG: Tensor) -> Tensor:
    """The advantages; ValueError where there is not one for each reward."""
    advantages_PG = call_user_code("its advantage", lambda: objective.advantages(rewards_PG))
    if advantages_PG.shape != rewards_PG.shape:
        shapes = f"{tuple(advantages_PG.shape)} for rewards of {tuple(rewards_PG.shape)}"
        raise ValueError(f"its advantage gave shape {shapes}; return one advantage per reward")
    return advantages_PG
