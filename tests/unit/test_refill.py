"""Dynamic sampling without a model: which groups are of use, where prompts of later rounds stand,
and what is refused.

Whole runs: faults/test_refill_runs.py. Costs 3 seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from test_prompts import Mixed, RoundlessFinite, source
from test_step import rollout, wave_of

from mesh.config.loading import load_conf
from mesh.program.groups import Groups, filled, joined
from mesh.program.loss_checks import read_loss
from mesh.program.records import samples_of
from mesh.program.refill_checks import difficulty_problems, refill_problems, round_problems
from mesh.rl.refill import next_round, unequal_groups
from mesh.rl.step import StepSettings, batch_of
from mesh.runs.warnings import StepWarnings
from mesh.tasks import Draw, numbered
from mesh.tasks.drawing import refill_draw
from mesh.tasks.prompts import digest_of, step_prompts
from mesh.tasks.spell_backward import SpellBackward
from mesh.types import Prompt, Rollout


def scored(prompt_id: int, *scores: tuple[float, bool | None, dict[str, float]]) -> list[Rollout]:
    """A group of rollouts with these rewards, verdicts and parts."""
    return [
        replace(rollout(prompt_id, i, 1, reward), correct=correct, parts=tuple(parts.items()))
        for i, (reward, correct, parts) in enumerate(scores)
    ]


WAVE = wave_of([
    *scored(0, (1.0, True, {"brief": 0.1}), (1.0, True, {"brief": 0.2})),
    *scored(1, (0.2, False, {"brief": 0.3}), (0.1, False, {"brief": 0.3})),
    *scored(4, (0.7 + 0.2 + 0.1, True, {}), (1.0, False, {"brief": 0.0})),
    *scored(9, (1.0, None, {"brief": 0.4}), (0.5, None, {})),
])  # fmt: skip


@dataclass(frozen=True)
class Half:
    """A response is correct from a reward of a half on."""

    def is_correct(self, reward: float) -> bool:
        return reward >= 0.5


@pytest.mark.parametrize(
    ("on", "task", "expected"),
    [
        ("reward", None, [1, 9]),  # of prompt 4 they differ by the rounding of their sum
        ("correct", None, [4, 9]),  # without a verdict, a reward of 1 is correct
        ("correct", Half(), [4]),
        ("brief", None, [0, 9]),  # a rollout without the part has 0
    ],
)
def test_a_group_is_of_use_where_the_quantity_differs_in_it(on, task, expected):
    assert unequal_groups(WAVE, 2, on, task) == expected


def test_no_outlines_off_the_trainer_are_no_groups():
    assert unequal_groups(wave_of([]), 2, "reward", None) == []
    assert unequal_groups(wave_of([]), 2, "nothing", None) == []


def test_a_part_that_no_score_has_is_refused_with_those_that_are_there():
    with pytest.raises(ValueError) as caught:
        unequal_groups(WAVE, 2, "breif", None)
    assert str(caught.value) == (
        "refill_on=breif: no score has a part of that name; start a new run with one of reward, "
        "correct, brief"
    )


def test_a_round_draws_what_fills_the_step_at_the_share_so_far():
    assert next_round(64, 0, 64) == 64, "nothing is known"
    assert next_round(64, 16, 64) == 64, "192 would be needed"
    assert next_round(64, 48, 64) == 22, "16 are missing, 3 of 4 are of use"
    assert next_round(64, 63, 65) == 2


def test_prompts_of_a_refill_have_places_and_rounds_of_their_own(process):
    """Even where each replaces prompts that are of no use by those of further rounds."""
    task = Mixed(0)
    skips = source(task, overlong="skip")
    found = {}
    for refill, num in ((0, 9), (1, 6), (2, 3)):
        draw = refill_draw(4, refill, num, 9) if refill else Draw(4, 9)
        prompts, metrics = step_prompts(skips, process, draw)
        assert [p.prompt_id for p in prompts] == [9 * refill + i for i in range(num)]
        first = task.train_prompts(4, num, 10_000 * refill)
        assert metrics["digest/prompts"] == digest_of(first)
        kept = {i for i in range(num) if (i + 10_000 * refill) % 3}
        assert [p.prompt for i, p in enumerate(prompts) if i in kept] == [first[i] for i in kept]
        found[refill] = {p.text for p in prompts}
    assert not found[0] & found[1] and not found[1] & found[2] and not found[0] & found[2]


def test_a_step_and_a_refill_are_named_in_messages(process):
    with pytest.raises(ValueError, match=r"^step 5, refill 2: .*3 prompts of step 5, refill 2\)"):
        step_prompts(source(Mixed(0)), process, refill_draw(4, 2, 3, 9))


def round_of(first_id: int, rewards: dict[int, tuple[float, float]]) -> Groups:
    prompts = numbered([Prompt(i, f"{i}>", "") for i in range(len(rewards))], first_id)
    rollouts = [
        rollout(place, i, 1, r) for place, pair in rewards.items() for i, r in enumerate(pair)
    ]
    wave = wave_of(rollouts)
    return Groups(prompts, rollouts, wave, wave, metrics={"prompts/held_out": 1.0})


def test_groups_enter_in_the_order_of_round_and_index_until_the_step_is_full():
    """By hand: 3 prompts a step; of use are 1, then 3 and 4 of the second round, and 5 too."""
    rounds = [
        round_of(0, {0: (1, 1), 1: (0, 1), 2: (0, 0)}),
        round_of(3, {3: (1, 0), 4: (2, 0), 5: (0, 3)}),
    ]
    whole = filled(rounds, [1, 3, 4, 5], 3)
    assert [o.key for o in whole.wave.outlines] == [(p, i) for p in (1, 3, 4) for i in (0, 1)]
    assert [r.prompt_id for r in whole.wave.rollouts] == [1, 1, 3, 3, 4, 4]
    assert [o.prompt_id for o in whole.drawn.outlines[::2]] == list(range(6))
    assert whole.left_out == {0: "equal", 2: "equal", 5: "surplus"}
    assert [p.prompt_id for p in whole.prompts] == list(range(6)) and len(whole.generated) == 12
    assert whole.metrics == {
        "prompts/held_out": 2.0, "prompts/drawn": 6.0, "prompts/rounds": 1.0,
        "groups/kept": 3.0, "groups/surplus": 1.0, "groups/missing": 0.0,
    }  # fmt: skip
    keys = StepSettings(3, 2, 1, False, 99, log_samples=-1)
    lines = samples_of(keys, 0, whole, {1: (-1, 1), 3: (1, -1), 4: (1, -1)}, [])
    found = {(x["prompt_id"], x["sample_id"]): (x["advantage"], x.get("left_out")) for x in lines}
    assert found[1, 0] == (-1, None) and found[4, 0] == (1, None)
    assert found[2, 1] == (0.0, "equal") and found[5, 1] == (0.0, "surplus")


def test_a_step_may_stay_empty():
    whole = filled([round_of(0, {0: (1, 1), 1: (0, 0)})], [], 2)
    assert not whole.wave.outlines and not whole.wave.rollouts
    assert whole.metrics["groups/kept"] == 0.0 and whole.metrics["groups/missing"] == 2.0
    assert whole.left_out == {0: "equal", 1: "equal"}


def test_waves_are_joined_in_order_and_counts_add_up():
    waves = [round_of(0, {0: (1, 1)}), round_of(1, {1: (0, 1)})]
    whole = joined(waves, {"digest/prompts": "ab", "prompts/held_out": 4.0})
    assert [o.key for o in whole.wave.outlines] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert whole.metrics == {"digest/prompts": "ab", "prompts/held_out": 6.0}


def test_a_sequence_was_generated_with_the_prompts_of_its_round():
    prompts = numbered([Prompt(i, f"{i}>", "") for i in range(11)])
    together = [[p.prompt_id for p in batch_of(prompts, place, 4)] for place in (3, 4, 10)]
    assert together == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]


def conf_of(*words: str):
    return load_conf(["conf=qwen3_tiny", *words])[1]


def test_keys_that_do_not_go_together_are_refused():
    assert refill_problems(conf_of("refill_rounds=3", "refill_on=correct")) == []
    assert refill_problems(conf_of("refill_rounds=3", "waves=2", "refill_on=correct")) == [
        "refill_rounds=3: with waves=2 the first wave is trained on before it is known which "
        "groups of the step are of use; set waves=1"
    ]
    assert refill_problems(conf_of("refill_on=correct")) == [
        "refill_on=correct: no group is replaced with refill_rounds=0; set refill_rounds=3, or "
        "leave it out"
    ]
    assert difficulty_problems(conf_of("difficulty.min=0.1", "difficulty.max=0.9")) == []
    assert difficulty_problems(conf_of("difficulty.min=0.8", "difficulty.max=0.3")) == [
        "difficulty.min=0.8: is above difficulty.max=0.3, so no question could be drawn again; "
        "lower it, or raise the other"
    ]
    assert difficulty_problems(conf_of("difficulty.forget=9")) == [
        "difficulty.forget=9: no pass rate is asked for without difficulty.min or difficulty.max; "
        "set one, or leave it out"
    ]


def test_losses_to_which_equal_groups_teach_something_are_not_refilled():
    def refused(*words: str) -> list[str]:
        with pytest.raises(ValueError) as caught:
            read_loss(conf_of("refill_rounds=3", *words))
        return str(caught.value).splitlines()

    assert read_loss(conf_of("refill_rounds=3", "loss=reinforce_pp_baseline")).advantage
    (line,) = refused("loss=reinforce_pp")
    assert line.startswith("refill_rounds=3: with advantage=whitened groups of equal rewards teach")
    lines = refused("loss=distill", "teacher.path=package:qwen3_tiny")
    assert [line for line in lines if line.startswith("refill_rounds=3: loss=distill learns from")]


def test_a_task_has_to_draw_more_and_to_say_what_it_draws():
    assert round_problems(conf_of(), RoundlessFinite(0)) == []
    assert round_problems(conf_of("refill_rounds=1"), SpellBackward(0)) == []
    (line,) = round_problems(conf_of("refill_rounds=1"), RoundlessFinite(0))
    assert line.startswith("refill_rounds=1: the task's train_prompts takes no round")
    assert line.endswith("let each round draw other prompts; or leave it out")
    (line,) = round_problems(conf_of("difficulty.max=0.5"), SpellBackward(0))
    assert line == (
        "difficulty.max=0.5: the task does not say which prompts it may draw, so a question may "
        "never be drawn twice, and has no pass rate; give it all_prompts() (docs/tasks.md), or "
        "leave it out"
    )
    (line,) = round_problems(conf_of("difficulty.min=0.5"), RoundlessFinite(0))
    assert line.startswith("difficulty.min=0.5: the task's train_prompts takes no round")


def test_a_step_that_stays_unfilled_is_warned_about_once():
    warnings = StepWarnings()
    counts = [(4.0, 0.0), (3.0, 1.0), (4.0, 0.0), (0.0, 4.0)]
    said = [
        warnings.see(step, {"groups/kept": kept, "groups/missing": missing, "prompts/drawn": 16.0})
        for step, (kept, missing) in enumerate(counts)
    ]
    assert [len(lines) for lines in said] == [0, 1, 0, 0]
    assert said[1][0].startswith(
        "warning: step 1 trains on 3 of 4 groups: those of its other prompts, 16 in all, are equal"
    )
