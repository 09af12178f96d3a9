"""The trainer's logprobs of a truncated policy: sets of before the first update, for all of them,
and for the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_trainer import conf_of, leaves_of, num_tokens, objective_for, passes_in, some_rollouts
from small_trainer import trainer_of as built_trainer

from mesh.exactness.trainer import resharded
from mesh.invariant.switch import batch_invariant
from mesh.model.token_sets import TokenSets
from mesh.rl.packing import pack
from mesh.rl.step import Pass
from mesh.roles.passes import head_inputs
from mesh.roles.trainer import Trainer
from mesh.types import Rollout

TRUNCATED = [
    "batch_invariant=true", "truncated_logprobs=true", "generator.top_k=30", "generator.top_p=0.6",
    "kl_coef=0.1", "updates_per_step=2", "trainer.lr=0.05",
]  # fmt: skip


@torch.no_grad()
def logits_of(trainer: Trainer, leaves: Pass, name: str = "model") -> torch.Tensor:
    """float64 logits over the temperature at the loss tokens, without ids that have no text; name:
    of the trainer's model."""
    with resharded(trainer):
        hidden, weight = head_inputs(getattr(trainer, name), pack(leaves))
        return hidden.double() @ weight.double().t() / trainer.settings.temperature


def likely(trainer: Trainer) -> list[Rollout]:
    """Rollouts whose tokens are the likeliest of the policy, which lie in any set."""
    rollouts = some_rollouts()
    for place in range(max(len(r.tokens) for r in rollouts)):
        known = logits_of(trainer, leaves_of(rollouts))
        best = known.argmax(-1).split([len(r.tokens) for r in rollouts])
        rollouts = [
            replace(r, tokens=(*r.tokens[:place], *ids.tolist()[place : place + 1],
                               *r.tokens[place + 1 :]))
            for r, ids in zip(rollouts, best, strict=True)
        ]  # fmt: skip
    return rollouts


@pytest.mark.usefixtures("solo_mesh")
def test_the_sets_before_the_first_update_hold_for_all_updates_and_for_the_reference():
    conf = conf_of(*TRUNCATED)
    trainer, objective = built_trainer(conf), objective_for(conf)
    with batch_invariant(True, "cpu"):
        share = leaves_of(likely(trainer))
        passes = passes_in(share, max_tokens=20)
        assert len(passes) > 1, "control: sets of several passes"
        known = trainer.score(passes, objective.needs, policy=True)
        for one in known:
            assert torch.equal(one.old_logprobs_A, one.reference_logprobs_A), "the start itself"
        first = trainer.accumulate(passes, objective, known).logprobs_A
        assert torch.equal(first, torch.cat([one.old_logprobs_A for one in known])), "ratio 1"
        trainer.update(1.0, num_tokens(share))
        moved, others = 0, []
        for leaves, one in zip(passes, known, strict=True):
            batch, z = pack(leaves), logits_of(trainer, leaves)
            inside = torch.cat([ids.inside(0, z.shape[1]) for ids in one.sets.ids])
            derived = TokenSets(trainer.settings.distribution, keeps=True)
            with resharded(trainer), torch.no_grad():
                trainer.model(
                    batch.tokens_T, batch.positions_T, context_of(batch), batch.index_A,
                    batch.targets_A, trainer.settings.temperature, sets=derived,
                )  # fmt: skip
            moved += (derived.ids[0].inside(0, z.shape[1]) != inside).any(-1).sum().item()
            right = z.masked_fill(~inside, -torch.inf).log_softmax(-1)
            others.append(right.gather(1, batch.targets_A[:, None])[:, 0])
        assert moved > 3, "control: under the new weights the sets are others"
        second = trainer.accumulate(passes, objective, known).logprobs_A
    torch.testing.assert_close(second.double(), torch.cat(others), rtol=1e-4, atol=1e-4)
    assert (second - first).abs().max() > 0.01


@pytest.mark.usefixtures("solo_mesh")
def test_the_reference_is_scored_over_the_sets_of_a_policy_that_has_moved():
    conf = conf_of(*TRUNCATED[:-2], "trainer.lr=0.05")
    trainer, objective = built_trainer(conf), objective_for(conf)
    with batch_invariant(True, "cpu"):
        share = leaves_of(likely(trainer))
        passes = passes_in(share)
        trainer.accumulate(passes, objective, trainer.score(passes, objective.needs))
        trainer.update(1.0, num_tokens(share))
        passes = passes_in(leaves_of(likely(trainer)))
        (leaves,), (known,) = passes, trainer.score(passes, objective.needs)
        targets_A1 = pack(leaves).targets_A[:, None]
        z, own = (logits_of(trainer, leaves, name) for name in ("model", "reference"))
        inside = torch.cat([ids.inside(0, z.shape[1]) for ids in known.sets.ids])
    least = z.masked_fill(~inside, torch.inf).amin(-1)
    assert (z.masked_fill(inside, -torch.inf).amax(-1) <= least).all(), "the policy's likeliest"
    largest = own.masked_fill(inside, -torch.inf).amax(-1)
    others = largest > own.masked_fill(~inside, torch.inf).amin(-1)
    right = own.masked_fill(~inside, -torch.inf).log_softmax(-1).gather(1, targets_A1)[:, 0]
    assert (others & right.isfinite()).sum() > 3, "control: the reference has other sets"
    torch.testing.assert_close(known.reference_logprobs_A.double(), right, rtol=1e-4, atol=1e-4)


def context_of(batch):
    from mesh.model.attention import packed_context

    return packed_context(batch.cu_seqlens, batch.max_seqlen)


@pytest.mark.usefixtures("solo_mesh")
def test_a_token_outside_of_its_set_stops_the_run():
    """As it would where the sides' bits are not equal: its probability is 0."""
    conf = conf_of(*TRUNCATED[:-3])
    trainer, objective = built_trainer(conf), objective_for(conf)
    share = leaves_of(some_rollouts())
    with batch_invariant(True, "cpu"):
        passes = passes_in(share)
        trainer.accumulate(passes, objective, trainer.score(passes, objective.needs))
        with pytest.raises(RuntimeError, match="not finite"):
            trainer.update(1.0, num_tokens(share))
