"""The trainer on one rank, against plain autograd on a copy of its weights."""

from __future__ import annotations

from functools import partial
from itertools import chain

import pytest
import torch
from small_trainer import conf_of, objective, some_leaves, trainer_of

from mesh.config.schema import Conf
from mesh.model.attention import packed_context
from mesh.model.parallel import local
from mesh.model.policy import Policy
from mesh.rl.packing import Leaf, pack
from mesh.roles.trainer import Trainer


def plain_logprobs(model: Policy, batch) -> torch.Tensor:
    context = packed_context(batch.cu_seqlens, batch.max_seqlen)
    hidden_TD = model.hidden(batch.tokens_T, batch.positions_T, context)
    logits = hidden_TD[batch.index_A] @ local(model.lm_head.weight).t()
    return logits.log_softmax(-1).gather(-1, batch.targets_A[:, None])[:, 0]


def step(trainer: Trainer, conf: Conf, share: list[Leaf], normaliser: float) -> dict[str, float]:
    tokens = sum(len(r.tokens) for leaf in share for r in leaf.rollouts)
    counts = [[leaf.num_tokens for leaf in share]]
    trainer.accumulate(share, counts, partial(objective, conf))
    return trainer.update(normaliser, tokens)


def test_kl_is_measured_against_the_weights_of_the_start(solo_mesh):
    """Worked out from k3 = exp(r - l) - (r - l) - 1 with plain log_softmax on both models."""
    conf = conf_of("kl_coef=0.3")
    trainer, share = trainer_of(conf), some_leaves()
    assert step(trainer, conf, share, 2.0)["kl"] == 0
    batch = pack(share)
    with torch.no_grad():
        moved, start = (plain_logprobs(m, batch) for m in (trainer.model, trainer.reference))
    difference = (start - moved).double()
    expected = (difference.exp() - difference - 1).mean()
    assert expected > 1e-6
    metrics = step(trainer, conf, share, 2.0)
    assert metrics["kl"] == pytest.approx(float(expected), rel=1e-3)


def test_kl_enters_the_loss_with_its_weight(solo_mesh):
    share = some_leaves()
    seen = []
    for words in (["kl_coef=0.3"], []):
        conf = conf_of(*words)
        trainer = trainer_of(conf)
        first = step(trainer, conf, share, 2.0)
        seen.append((first, step(trainer, conf, share, 2.0)))
    (with_first, with_second), (without_first, without_second) = seen
    assert with_first["loss"] == without_first["loss"], "the KL is 0 at the start"
    # a token weighs 0.5, the normaliser is 2: the mean KL enters tokens * 0.3 * 0.5 / 2 times
    tokens = with_second["tokens/trained"]
    added = with_second["loss"] - without_second["loss"]
    assert added == pytest.approx(with_second["kl"] * tokens * 0.3 * 0.5 / 2, rel=1e-3)


def test_microbatches_and_calls_add_up_to_one_gradient(solo_mesh):
    """One call with everything packed, and a call per leaf with a microbatch each."""
    share, found = some_leaves(), []
    for words, parts in ((["trainer.microbatch_tokens=4096"], 1), (["model.max_length=32"], 2)):
        conf = conf_of(*words)
        conf.trainer.microbatch_tokens = 4096 if parts == 1 else 1
        trainer = trainer_of(conf)
        groups = [share] if parts == 1 else [[leaf] for leaf in share]
        for group in groups:
            counts = [[leaf.num_tokens for leaf in group]]
            trainer.accumulate(group, counts, partial(objective, conf))
        tokens = sum(len(r.tokens) for leaf in share for r in leaf.rollouts)
        found.append(trainer.update(4.0, tokens))
    for key in ("loss", "grad_norm", "entropy", "clip_fraction", "logprob_diff/max"):
        assert found[0][key] == pytest.approx(found[1][key], rel=1e-5), key


def test_a_gradient_that_is_not_finite_stops_the_run(solo_mesh):
    conf = conf_of()
    trainer, share = trainer_of(conf), some_leaves()
    assert trainer.model is not None
    with torch.no_grad():
        next(iter(trainer.model.parameters())).to_local()[0, 0] = torch.nan
    with pytest.raises(RuntimeError, match="step 1 is not finite"):
        step(trainer, conf, share, 1.0)


def test_leaves_that_are_not_the_schedule_s_are_refused(solo_mesh):
    conf = conf_of()
    trainer, share = trainer_of(conf), some_leaves()
    with pytest.raises(AssertionError, match="not the leaves"):
        trainer.accumulate(share, [[1] * len(share)], partial(objective, conf))


def test_every_group_dropped_leaves_the_weights_alone(solo_mesh):
    conf = conf_of()
    trainer = trainer_of(conf)
    before = {name: w.to_local().clone() for name, w in trainer.parameters().items()}
    trainer.accumulate([], [[]], partial(objective, conf))
    assert trainer.update(1.0, 0)["grad_norm"] == 0
    after = trainer.parameters()
    assert all(torch.equal(before[name], after[name].to_local()) for name in before)
    assert len(list(chain(before))) > 20
