"""Several updates a step: how groups are cut, each update against plain PyTorch, when it stops."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import replace
from math import inf

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_trainer import conf_of, num_tokens, objective_for, passes_in, some_leaves, trainer_of

from mesh.layout.holdings import local_tensors
from mesh.model.attention import packed_context
from mesh.model.init import random_weights
from mesh.model.layouts import role_layouts
from mesh.model.logprobs import TokenScores
from mesh.model.policy import Policy, build_policy, named_weights
from mesh.program.checks import conf_problems
from mesh.recipes.grpo import later_updates
from mesh.rl.cutting import minibatches, owner
from mesh.rl.packing import Leaf, pack
from mesh.rl.step import Minibatch, StepSettings, share_of, with_scores
from mesh.rl.updates import step_metrics
from mesh.roles.passes import PassScores, old_scores
from mesh.roles.sums import largest
from mesh.roles.trainer import Trainer
from mesh.types import Rollout, Wave, outline

WORDS = ("trainer.eps=1e-3", "trainer.lr=3e-3", "clip_low=0.02", "clip_high=0.03")
NORMALISER = 2.0


def test_every_group_is_in_one_minibatch_by_chance_and_fairly():
    """The cut is pinned: a resumed or replayed run of another version has to make the same."""
    assert minibatches(range(8), 2, seed=3, step=5) == [{2, 4, 5, 7}, {0, 1, 3, 6}]
    assert minibatches(range(8), 1, seed=3, step=5) == [set(range(8))]
    counts: Counter[tuple[int, int]] = Counter()
    for step in range(300):
        parts = minibatches(range(12), 3, seed=0, step=step)
        assert minibatches(reversed(range(12)), 3, seed=0, step=step) == parts
        counts.update((i, number) for number, part in enumerate(parts) for i in part)
    assert all(70 < counts[i, number] < 130 for i in range(12) for number in range(3))
    assert minibatches(range(12), 3, 0, 1) != minibatches(range(12), 3, 1, 1)


@given(st.sets(st.integers(0, 200), max_size=40), st.integers(1, 6), st.integers(0, 9))
def test_any_groups_are_cut_into_parts_that_differ_by_one_at_most(prompt_ids, updates, step):
    parts = minibatches(prompt_ids, updates, seed=1, step=step)
    assert len(parts) == updates and sorted(i for part in parts for i in part) == sorted(prompt_ids)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_ranks_have_as_many_groups_of_a_minibatch_as_each_other(num_ranks):
    for part in minibatches(range(64), 4, seed=2, step=9):
        counts = Counter(owner(i, num_ranks) for i in part)
        assert [counts[rank] for rank in range(num_ranks)] == [16 // num_ranks] * num_ranks


def wave_of(num_groups: int, rank: int, num_ranks: int) -> Wave:
    """Groups of 2 whose rewards are equal in every third group."""
    rollouts = [
        Rollout(i, s, (5,) * 3, (6,) * (1 + i % 3 + s), (-1.0,) * (1 + i % 3 + s),
                float(s if i % 3 else 1), "stop")
        for i in range(num_groups) for s in range(2)
    ]  # fmt: skip
    mine = [r for r in rollouts if owner(r.prompt_id, num_ranks) == rank]
    return Wave([outline(r) for r in rollouts], mine)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_share_has_the_same_minibatches_on_any_mesh(num_ranks):
    keys = StepSettings(6, 2, 1, drop_equal_groups=True, pass_tokens=20, updates=3, seed=4)
    parts = minibatches(range(6), 3, seed=4, step=8)
    shares = [
        share_of(wave_of(6, rank, num_ranks), keys, num_ranks, rank, 8) for rank in range(num_ranks)
    ]
    for number, part in enumerate(parts):
        cut = [share.minibatches[number] for share in shares]
        trained = [r for one in cut for leaves in one.passes for leaf in leaves
                   for r in leaf.rollouts]  # fmt: skip
        due = [r for r in wave_of(6, 0, 1).rollouts if r.prompt_id in part and r.prompt_id % 3]
        assert sorted(r.key for r in trained) == [r.key for r in due]
        assert len({len(one.passes) for one in cut}) == 1, "collectives would not meet"
        tokens = sum(r.length for r in due)
        assert {(one.tokens, one.sequences) for one in cut} == {(tokens, len(due))}
    assert {share.tokens for share in shares} == {
        sum(r.length for r in wave_of(6, 0, 1).rollouts if r.prompt_id % 3)
    }
    off = share_of(Wave([], []), keys, num_ranks, None, 8)
    assert off.minibatches == [Minibatch([], 0, 0)] * 3


def test_scores_of_passes_go_to_their_minibatches():
    share = share_of(wave_of(6, 0, 1), StepSettings(6, 2, 1, False, 0, updates=3), 1, 0, step=0)
    numbers = list(range(len(share.passes)))
    found = with_scores(share, numbers)
    assert [one for one, _ in found] == share.minibatches
    assert [n for _, scores in found for n in scores] == numbers
    assert all(len(one.passes) == len(scores) for one, scores in found)
    with pytest.raises(AssertionError, match="scores of other passes"):
        with_scores(share, [*numbers, 9])


def minibatch_of(leaf: Leaf) -> Minibatch:
    return Minibatch(passes_in([leaf]), num_tokens([leaf]), len(leaf.rollouts))


def step(
    trainer: Trainer, words: tuple[str, ...] = WORDS, kl_stop: float = inf
) -> dict[str, float]:
    """A step of an update a leaf, as the recipe takes it."""
    objective = replace(objective_for(conf_of(*words)), longest_response=1)
    batches = [minibatch_of(leaf) for leaf in some_leaves()]
    known = [trainer.score(one.passes, objective.needs, policy=True) for one in batches]
    trainer.accumulate(batches[0].passes, objective, known[0])
    normaliser = objective.normaliser(batches[0].tokens, batches[0].sequences)
    updates = [trainer.update(normaliser, batches[0].tokens)]
    later = list(zip(batches, known, strict=True))[1:]
    return step_metrics([*updates, *later_updates(trainer, objective, later, kl_stop)])


def plain_model() -> Policy:
    """The small trainer's policy at its start, without FSDP."""
    settings = trainer_of(conf_of()).settings
    mesh = torch.distributed.device_mesh.init_device_mesh(
        "cpu", (1, 1, 1), mesh_dim_names=("dp_replicate", "dp_shard", "tp")
    )
    model = build_policy(
        settings.shape, settings.max_length, torch.device("cpu"), torch.float32, mesh
    )
    layouts = role_layouts(settings.shape, settings.max_length, mesh.mesh, fsdp=True)
    blocks = {layout.name: layout.blocks.get(0) for layout in layouts}
    with torch.no_grad():
        tensors = local_tensors(named_weights(model))
    random_weights(tensors, {x.name: x.shape for x in layouts}, blocks, settings.start.seed)
    return model


def plain_logprobs(model: Policy, leaf: Leaf) -> torch.Tensor:
    batch = pack([leaf])
    context = packed_context(batch.cu_seqlens, batch.max_seqlen)
    hidden_TD = model.hidden(batch.tokens_T, batch.positions_T, context)
    logits = hidden_TD[batch.index_A] @ model.lm_head.weight.t()
    return logits.log_softmax(-1).gather(-1, batch.targets_A[:, None])[:, 0]


def plain_step(model: Policy, optimizer: torch.optim.Optimizer) -> list[dict[str, float]]:
    """PPO with two minibatches, as it is written everywhere."""
    leaves, found = some_leaves(), []
    with torch.no_grad():
        old = [plain_logprobs(model, leaf) for leaf in leaves]
    for leaf, old_A in zip(leaves, old, strict=True):
        logprobs_A, batch = plain_logprobs(model, leaf), pack([leaf])
        ratio_A, advantages_A = (logprobs_A - old_A).exp(), batch.advantages_A
        clipped_A = ratio_A.clamp(1 - 0.02, 1 + 0.03)
        loss_A = -torch.minimum(ratio_A * advantages_A, clipped_A * advantages_A)
        loss = (loss_A * batch.weights_A).sum() / len(leaf.rollouts)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ratio_A = ratio_A.detach()
        moved_A, clipped_A = ratio_A.double().log(), ratio_A.clamp(1 - 0.02, 1 + 0.03)
        is_clipped_A = ratio_A * advantages_A > clipped_A * advantages_A
        found.append({
            "loss": loss.item(), "grad_norm": float(norm), "ratio/max": float(ratio_A.max()),
            "ratio/mean": float(ratio_A.mean()),
            "clip_fraction": float(is_clipped_A.double().mean()),
            "approx_kl": float((moved_A.exp() - 1 - moved_A).mean()),
        })  # fmt: skip
    return found


def test_two_steps_of_two_updates_are_those_of_a_plain_loop(solo_mesh):
    """Metrics of each update and the weights after it; the second update is clipped in part."""
    trainer, model = trainer_of(conf_of(*WORDS)), plain_model()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-3, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.0
    )
    start = {name: w.clone() for name, w in local_tensors(trainer.parameters()).items()}
    for number in range(2):
        mine, theirs = step(trainer), plain_step(model, optimizer)
        for place, update in enumerate(theirs, 1):
            for key, value in update.items():
                found = mine[f"update/{place}/{key}"]
                assert found == pytest.approx(value, rel=2e-3, abs=2e-6), (number, place, key)
        assert mine["update/1/ratio/max"] == mine["update/1/ratio/mean"] == 1
        assert mine["update/1/approx_kl"] == mine["update/1/clip_fraction"] == 0
        assert 0 < theirs[1]["clip_fraction"] < 1 and theirs[1]["approx_kl"] > 1e-5
        weights = named_weights(model)
        for name, w in local_tensors(trainer.parameters()).items():
            torch.testing.assert_close(w, weights[name].detach(), rtol=1e-3, atol=3e-5)
    assert (trainer.steps, trainer.updates) == (2, 4)
    moved = max(float((w - start[n]).abs().max()) for n, w in local_tensors(
        trainer.parameters()).items())  # fmt: skip
    assert moved > 3e-3


def test_the_mismatch_is_that_of_all_tokens_before_the_first_update(solo_mesh):
    """The generator's logprobs are another policy's, and the ratio does not see them."""
    trainer, model = trainer_of(conf_of(*WORDS)), plain_model()
    metrics = step(trainer)
    with torch.no_grad():
        differences = torch.cat([
            plain_logprobs(model, leaf) - pack([leaf]).generator_logprobs_A
            for leaf in some_leaves()
        ]).abs()  # fmt: skip
    assert metrics["logprob_diff/max"] == pytest.approx(float(differences.max()), rel=1e-4)
    assert metrics["logprob_diff/mean"] == pytest.approx(float(differences.mean()), rel=1e-4)
    assert metrics["logprob_diff/max"] > 0.05 and metrics["ratio/max"] < 1.5


def test_a_step_stops_where_the_policy_has_moved_too_far(solo_mesh):
    """What was accumulated for the update that is left out changes nothing, then or later."""
    whole, stopped, single = (trainer_of(conf_of(*WORDS)) for _ in range(3))
    everything = step(whole)
    bound = everything["update/2/approx_kl"]
    assert bound > 0 and everything["updates"] == 2
    assert step(trainer_of(conf_of(*WORDS)), kl_stop=bound) == everything, "it is not above it"
    left_out = step(stopped, kl_stop=bound * 0.99)
    objective, first = objective_for(conf_of(*WORDS)), minibatch_of(some_leaves()[0])
    known = single.score(first.passes, objective.needs, policy=True)
    single.accumulate(first.passes, objective, known)
    alone = single.update(objective.normaliser(first.tokens, first.sequences), first.tokens)
    assert same_weights(stopped, single) and not same_weights(stopped, whole)
    assert (stopped.steps, stopped.updates) == (1, 1)
    assert left_out["updates"] == 1
    assert left_out["update/2/approx_kl"] == bound and "update/2/grad_norm" not in left_out
    for key in ("loss", "grad_norm", "tokens/trained", "clip_fraction", "entropy"):
        assert left_out[key] == alone[key]
    # the mismatch is of all tokens nevertheless
    assert left_out["logprob_diff/mean"] == everything["logprob_diff/mean"]
    copied = copy.deepcopy([step(one, kl_stop=inf) for one in (stopped, single)])
    assert copied[0] == copied[1] and same_weights(stopped, single)


def same_weights(one: Trainer, other: Trainer) -> bool:
    pairs = zip(
        local_tensors(one.parameters()).values(),
        local_tensors(other.parameters()).values(),
        strict=True,
    )
    return all(torch.equal(a, b) for a, b in pairs)


def update_of(trainer: Trainer, number: int, silent: bool = False, bad: bool = False):
    """One update on a leaf, whose advantages are 0 if it is to be silent."""
    leaf = some_leaves()[0]
    advantages = tuple(0.0 if silent else float("nan") if bad else a for a in leaf.advantages)
    passes = passes_in([replace(leaf, advantages=advantages)])
    objective = objective_for(conf_of())
    trainer.accumulate(passes, objective, [PassScores()])
    return trainer.update(NORMALISER, num_tokens([leaf]), number)


def test_steps_and_not_updates_set_the_learning_rate_and_are_counted(solo_mesh):
    """lr by the step; a step is without signal if all of its updates are."""
    trainer = trainer_of(conf_of("trainer.warmup_steps=4"))
    silents = [(True, True), (True, False), (False, True), (True, True, True)]
    rates, counts = [], []
    for silent in silents:
        made = [update_of(trainer, number, one) for number, one in enumerate(silent)]
        rates.append({one["lr"] for one in made})
        counts.append(made[-1]["steps_without_signal"])
    assert rates == [{1e-3 * n / 4} for n in (1, 2, 3, 4)]
    assert counts == [1, 1, 1, 2]
    assert (trainer.steps, trainer.updates, trainer.without_signal) == (4, 2, 2)


def test_an_update_that_is_not_finite_is_named_or_skipped_and_the_next_one_made(solo_mesh):
    trainer = trainer_of(conf_of())
    update_of(trainer, 0)
    with pytest.raises(RuntimeError, match="step 1, update 2 is not finite"):
        update_of(trainer, 1, bad=True)
    trainer = trainer_of(conf_of("on_nonfinite=skip"))
    made = [update_of(trainer, number, bad=number == 1) for number in range(3)]
    assert [one["skipped"] for one in made] == [0, 1, 0]
    assert step_metrics(made)["skipped"] == 1 and trainer.updates == 2


def test_the_metrics_of_a_step_by_hand():
    def update(tokens: float, **values: float) -> dict[str, float]:
        given = {"loss": 1.0, "grad_norm": 2.0, "clip_fraction": 0.0, "ratio/max": 1.0,
                 "ratio/mean": 1.0, "approx_kl": 0.0, "entropy": 1.0, "lr": 0.1,
                 "logprob_diff/max": 0.5, "logprob_diff/mean": 0.25, "skipped": 0.0,
                 "steps_without_signal": 3.0, "tokens/trained": tokens}  # fmt: skip
        return given | {name.replace("_max", "/max"): value for name, value in values.items()}

    first = update(10.0)
    assert step_metrics([first]) == {k: v for k, v in first.items() if k != "approx_kl"}
    second = update(30.0, loss=4.0, grad_norm=0.0, clip_fraction=0.2, ratio_max=1.5, entropy=2.0,
                    approx_kl=0.03, skipped=1.0)  # fmt: skip
    stopped = {"clip_fraction": 0.4, "ratio/max": 2.0, "ratio/mean": 1.1, "approx_kl": 0.1}
    metrics = step_metrics([first, second | {"logprob_diff/max": 9.0}, stopped])
    expected = {
        "loss": 2.5, "grad_norm": 1.0, "clip_fraction": 0.15, "ratio/max": 1.5, "entropy": 1.75,
        "logprob_diff/max": 0.5, "skipped": 1.0, "tokens/trained": 40.0, "lr": 0.1,
        "steps_without_signal": 3.0, "updates": 2.0, "ratio/mean": 1.0,
        "update/1/loss": 1.0, "update/2/loss": 4.0, "update/2/approx_kl": 0.03,
        "update/3/approx_kl": 0.1, "update/3/clip_fraction": 0.4,
    }  # fmt: skip
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert "update/3/loss" not in metrics and "approx_kl" not in metrics
    assert step_metrics([{}, {}]) == {}, "off the trainer"


def test_inspectors_see_the_logprobs_before_the_first_update():
    trained, scored_A = TokenScores(torch.tensor([1.0]), torch.tensor([0.5])), torch.tensor([2.0])
    known = PassScores(scored_A, old_entropy_A=torch.tensor([3.0]))
    assert old_scores([PassScores(), PassScores()], trained) is trained
    assert [x_A.tolist() for x_A in old_scores([known] * 2, trained)] == [[2.0] * 2, [3.0] * 2]
    with pytest.raises(AssertionError, match="some passes were scored"):
        old_scores([known, PassScores()], trained)


REFUSED = {
    "no divisor": (
        ["updates_per_step=6"],
        "updates_per_step=6: does not divide num_prompts=64, and a minibatch has whole groups; use "
        "a divisor, such as 4",
    ),
    "waves": (
        ["updates_per_step=2", "waves=4"],
        "waves=4: with updates_per_step=2 all rollouts of a step are scored before its first "
        "update, so training cannot begin with a part of them; set waves=1, or updates_per_step=1",
    ),
    "nothing to stop": (
        ["kl_stop=0.1"],
        "kl_stop=0.1: it leaves out updates after a step's first, and updates_per_step=1 has none; "
        "leave it out, or set updates_per_step=2 or more",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused(case):
    words, line = REFUSED[case]
    assert conf_problems(conf_of(*words), "cpu") == [line]
    assert conf_problems(conf_of("updates_per_step=4", "kl_stop=0.1"), "cpu") == []


def test_a_kl_that_is_not_finite_is_reported_and_ends_no_step_quietly(solo_mesh):
    trainer, objective = trainer_of(conf_of(*WORDS)), objective_for(conf_of(*WORDS))
    update_of(trainer, 0)
    batch = minibatch_of(some_leaves()[0])
    known = [PassScores(torch.full((batch.tokens,), -inf))]
    with pytest.raises(RuntimeError, match="step 1, update 2 is not finite"):
        later_updates(trainer, objective, [(batch, known)], kl_stop=0.1)
    assert largest(float("nan"), trainer.cpu_group) == inf
    assert largest(-0.5, trainer.cpu_group) == -0.5


def test_the_metrics_of_skipped_updates_may_be_infinite():
    """Infinities of both signs, which an exact sum refuses."""
    made = {"grad_norm": 1.0, "tokens/trained": 2.0, "approx_kl": 0.0}
    metrics = step_metrics([made | {"loss": inf}, made | {"loss": -inf}, made | {"loss": 1.0}])
    assert math.isnan(metrics["loss"]) and metrics["grad_norm"] == 1
    assert step_metrics([made | {"loss": inf}, made | {"loss": 1.0}])["loss"] == inf
