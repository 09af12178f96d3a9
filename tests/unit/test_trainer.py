"""The trainer on one rank, against plain autograd on a copy of its weights."""

from __future__ import annotations

import pytest
import torch
from small_trainer import (
    accumulate,
    conf_of,
    num_tokens,
    objective_for,
    passes_in,
    some_leaves,
    trainer_of,
)

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
    accumulate(trainer, passes_in(share), objective_for(conf))
    return trainer.update(normaliser, num_tokens(share))


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


def test_passes_and_calls_add_up_to_one_gradient(solo_mesh):
    """One call with everything packed, and a call per leaf with a pass each."""
    share, found, conf = some_leaves(), [], conf_of()
    for waves in ([passes_in(share, 4096)], [passes_in([leaf], 1) for leaf in share]):
        trainer = trainer_of(conf)
        for passes in waves:
            assert len(passes) == 1
            accumulate(trainer, passes, objective_for(conf))
        found.append(trainer.update(4.0, num_tokens(share)))
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


def test_every_group_dropped_leaves_the_weights_alone(solo_mesh):
    conf = conf_of()
    trainer = trainer_of(conf)
    before = {name: w.to_local().clone() for name, w in trainer.parameters().items()}
    scores = accumulate(trainer, [], objective_for(conf))
    assert scores.logprobs_A.shape == scores.entropy_A.shape == (0,)
    assert trainer.update(1.0, 0)["grad_norm"] == 0
    after = trainer.parameters()
    assert all(torch.equal(before[name], after[name].to_local()) for name in before)
    assert len(before) > 20
