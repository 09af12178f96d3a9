"""Findings: each on a series that was made to have it, none on runs that learn."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from mesh.runs.warnings import KINDS
from tools.report import findings, rank_findings, run_findings
from tools.report.curves import points_of
from tools.report.findings import WARNED, Evidence, findings_of
from tools.report.rank_findings import TAKE_TURNS
from tools.report.reading import Run
from tools.report.run_findings import ALL
from tools.report.signals import Signal
from tools.report.timeline import RankStep, TimelineStep

STEPS = 150


def healthy(step):
    """A run that learns, with the noise of a small one."""
    done, noise = step / STEPS, random.Random(step).gauss(0, 0.02)
    line = {"step": step}
    if step:
        line |= {
            "reward/mean": 0.3 + 0.5 * done + noise, "reward/std": 0.45,
            "entropy": 1.0 - 0.7 * done, "equal_groups": 0.1 + 0.4 * done,
            "response_length/mean": 100 + 30 * done,
            "response/truncated": 0.05, "grad_norm": 1.0 + 10 * noise, "loss": noise,
            "logprob_diff/max": 0.3, "logprob_diff/mean": 0.004, "skipped": 0.0,
        }  # fmt: skip
    if step % 10 == 0:
        line["eval/accuracy"] = 0.3 + 0.5 * done + noise
    return line


def found_in(tmp_path, change=lambda step: {}, steps=STEPS, settings=None, timeline=(), starts=1):
    """Findings by title, of a healthy run whose lines are changed; None removes a metric."""
    lines = []
    for step in range(steps + 1):
        line = healthy(step) | change(step)
        lines.append({key: value for key, value in line.items() if value != "gone"})
    run = Run(tmp_path, metrics=lines, settings={"trainer.clip_norm": "1.0"} | (settings or {}))
    run.environments = [{}] * starts
    evidence = Evidence(run, points_of(run), {}, timeline)
    return {found["title"]: found for found in findings_of(evidence, ALL)}


def test_a_run_that_learns_has_no_finding(tmp_path):
    assert found_in(tmp_path) == {}


FROM = 60
CASES = {
    "Entropy collapsed": lambda s: {"entropy": 0.01, "reward/mean": 0.5, "eval/accuracy": 0.5},
    "Responses grow without gain": lambda s: {
        "response_length/mean": 300.0, "reward/mean": 0.5, "response/truncated": 0.15},
    "Responses are truncated": lambda s: {"response/truncated": 0.3},
    "Most responses were truncated": lambda s: {"response/truncated": 0.7},
    "Most groups are equal": lambda s: {"equal_groups": 0.95},
    "Steps without signal": lambda s: {"grad_norm": 0.0, "equal_groups": 1.0},
    "Trainer and generator disagree": lambda s: {"logprob_diff/mean": 0.2},
    "Updates were skipped": lambda s: {"skipped": 1.0, "grad_norm": None},
    "Numbers that are not finite": lambda s: {"loss": None, "grad_norm": None},
    "Prompts were skipped": lambda s: {"prompts/skipped": 3.0},
    "Dynamic sampling did not fill the step": lambda s: {
        "groups/missing": 2.0, "groups/kept": 6.0, "prompts/drawn": 30.0},
    "Too few prompts of the wanted difficulty": lambda s: {"difficulty/waived": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("title", CASES)
def test_a_finding_names_the_step_where_it_began_and_what_to_try(tmp_path, title):
    found = found_in(tmp_path, lambda step: CASES[title](step) if step >= FROM else {})
    assert title in found, found.keys()
    one = found[title]
    assert FROM <= one["step"] <= FROM + 5  # a running median of five follows
    assert one["severity"] in ("bad", "warn", "info") and one["text"] and one["try"]
    others = found.keys() - {title, "Most groups are equal", "Responses grow without gain"}
    assert not others, others


def test_a_collapse_is_told_from_the_value_at_which_the_curve_begins(tmp_path):
    collapse = CASES["Entropy collapsed"]
    found = found_in(
        tmp_path, lambda s: ({"entropy": 0.3 if s > 1 else 1.3}) | (collapse(s) if s > 9 else {})
    )
    assert "from 1.3 nats at step 0 to 0.01:" in found["Entropy collapsed"]["text"]


def test_a_reward_that_fell_before_the_signal_was_lost_is_what_to_look_at(tmp_path):
    lost = {"grad_norm": 0.0, "equal_groups": 1.0}
    fell = found_in(tmp_path, lambda s: lost | {"reward/mean": 0.0} if s > 1 else {})
    assert fell["Steps without signal"]["try"].startswith("The mean reward fell from 0.3")
    rose = found_in(tmp_path, lambda s: lost | {"reward/mean": 0.5} if s > 1 else {})
    assert rose["Steps without signal"]["try"].startswith("Use prompts")


def test_rewards_that_never_vary_are_said_once(tmp_path):
    change = {"reward/std": 0.0, "reward/mean": 0.0, "equal_groups": 1.0, "eval/accuracy": "gone"}
    found = found_in(tmp_path, lambda step: change if step else {"eval/accuracy": "gone"})
    assert found["Rewards never vary"]["step"] == 1
    assert "Most groups are equal" not in found and "No evaluation" in found


def test_a_reward_that_falls_is_found_at_its_peak(tmp_path):
    found = found_in(tmp_path, lambda s: {"reward/mean": 0.3} if s > 100 else {})
    one = found["The reward fell"]
    assert 95 <= one["step"] <= 105 and one["severity"] == "warn"
    assert found_in(tmp_path, lambda s: {"reward/mean": 0.6} if s > 100 else {}) == {}


def test_an_evaluation_below_its_best_is_found(tmp_path):
    found = found_in(tmp_path, lambda s: {"eval/accuracy": 0.2} if s == STEPS else {})
    assert found["The evaluation got worse"]["step"] == 140
    assert found_in(tmp_path, lambda s: {"eval/accuracy": 0.75} if s == STEPS else {}) == {}


def test_exact_runs_must_be_exact(tmp_path):
    exact = {"batch_invariant": "true"}
    zero = {"logprob_diff/max": 0.0, "logprob_diff/mean": 0.0}
    assert found_in(tmp_path, lambda s: zero, settings=exact) == {}
    found = found_in(
        tmp_path, lambda s: zero | ({"logprob_diff/max": 1e-7} if s in (7, 9) else {}),
        settings=exact,
    )  # fmt: skip
    one = found["Not exact, though batch_invariant is on"]
    assert (one["severity"], one["step"]) == ("bad", 7) and "2 of 151 steps" in one["text"]


def test_steps_that_train_on_nothing_are_no_collapse(tmp_path):
    """Their entropy is 0, as is their number of tokens."""
    nothing = {"entropy": 0.0, "tokens/trained": 0, "logprob_diff/mean": 0.0}
    assert found_in(tmp_path, lambda s: nothing if 60 <= s < 90 else {}) == {}
    found = found_in(tmp_path, lambda s: {"entropy": 0.0, "tokens/trained": 9} if s >= 60 else {})
    assert found.keys() == {"Entropy collapsed"}


def test_silence_after_success_is_no_problem(tmp_path):
    def solved(step):
        if step < FROM:
            return {}
        return {"grad_norm": 0.0, "equal_groups": 1.0, "entropy": 0.001, "reward/mean": 1.0,
                "eval/accuracy": 1.0}  # fmt: skip

    found = found_in(tmp_path, solved)
    assert {one["severity"] for one in found.values()} == {"info"}
    assert found.keys() == {"Nothing left to learn", "Most groups are equal"}


def test_gradient_spikes_are_counted(tmp_path):
    found = found_in(tmp_path, lambda s: {"grad_norm": 50.0} if s in (50, 51, 90) else {})
    one = found["Gradient spikes"]
    assert (one["severity"], one["step"]) == ("warn", 50) and "In 3 steps" in one["text"]
    assert found_in(tmp_path, lambda s: {"grad_norm": 4.0} if s == 50 else {}) == {}


def test_longer_responses_that_pay_are_no_finding(tmp_path):
    assert found_in(tmp_path, lambda s: {"response_length/mean": 100 + 3.0 * s}) == {}


def rank(number, role, *events):
    return RankStep(number, role, tuple(events))


def split_steps(numbers, generated, waits):
    """Steps of 4 s: rollouts until `generated`, then training, of which the generator waits so many
    seconds for the weights."""
    return [
        TimelineStep(number, (
            rank(0, "trainer", ("exchange", 0.0, generated, generated),
                 ("train", generated, 4.0, 0.0)),
            rank(1, "generator", ("generate", 0.0, generated, 0.0),
                 ("sync", generated, 4.0, waits))))
        for number in numbers
    ]  # fmt: skip


def test_a_slow_rank_and_who_waits_for_whom_are_found(tmp_path):
    slow = [
        TimelineStep(s, (
            rank(0, "both", ("generate", 0.0, 1.0, 0.0), ("exchange", 1.0, 2.0, 0.9)),
            rank(1, "both", ("generate", 0.0, 2.0, 0.0), ("exchange", 2.0, 2.1, 0.0)),
            rank(2, "both", ("generate", 0.0, 1.1, 0.0), ("exchange", 1.1, 2.1, 0.9))))
        for s in range(1, 6)
    ]  # fmt: skip
    found = found_in(tmp_path, timeline=slow)
    assert found.keys() == {"Rank 1 is slow"} and "generate" in found["Rank 1 is slow"]["text"]
    found = found_in(tmp_path, timeline=split_steps(range(1, 6), generated=3.0, waits=0.2))
    assert found.keys() == {"The trainer waits for the generator"}
    assert found["The trainer waits for the generator"]["severity"] == "warn"
    assert "75%" in found["The trainer waits for the generator"]["text"]


def test_roles_that_wait_for_each_other_are_not_told_to_take_ranks_from_each_other(tmp_path):
    found = found_in(tmp_path, timeline=split_steps(range(1, 11), generated=2.0, waits=2.0))
    assert len(found) == 2 and {one["try"] for one in found.values()} == {TAKE_TURNS}


def test_a_rank_that_becomes_slow_is_found_where_it_does(tmp_path):
    """For the first two thirds of the run it is as fast as the others; one slow step is none."""

    def step(number):
        late = 3.0 if number > 100 or number == 50 else 1.0
        ranks = (rank(0, "both", ("train", 0.0, 1.0, 0.0), ("sync", 1.0, late, 0.0)),
                 rank(1, "both", ("train", 0.0, late, 0.0)))  # fmt: skip
        return TimelineStep(number, ranks)

    found = found_in(tmp_path, timeline=[step(number) for number in range(151)])
    assert found.keys() == {"Rank 1 is slow"}
    assert 100 < found["Rank 1 is slow"]["step"] <= 105
    assert "works 3 s a step in the phase train" in found["Rank 1 is slow"]["text"]
    assert found_in(tmp_path, timeline=[step(number) for number in range(101)]) == {}


def test_a_wait_that_begins_late_is_found_where_it_does(tmp_path):
    def step(number):
        wait = 0.8 if number > 100 else 0.0
        ranks = (rank(0, "trainer", ("exchange", 0.0, 1.0, wait)),
                 rank(1, "generator", ("generate", 0.0, 1.0, 0.0)))  # fmt: skip
        return TimelineStep(number, ranks)

    found = found_in(tmp_path, timeline=[step(number) for number in range(151)])
    one = found["The trainer waits for the generator"]
    assert 100 < one["step"] <= 105 and "spend 80%" in one["text"]


def test_starts_and_missing_evaluations_are_said(tmp_path):
    found = found_in(tmp_path, lambda s: {"eval/accuracy": "gone"}, starts=3)
    assert found.keys() == {"The run was resumed", "No evaluation"}
    assert "3 times" in found["The run was resumed"]["text"]
    assert found_in(tmp_path, lambda s: {"eval/accuracy": "gone"}, steps=5) == {}


def test_every_warning_of_a_run_is_a_finding():
    assert {kind.holds for kind in KINDS} == set(WARNED)


def test_the_documentation_lists_every_finding():
    sources = [Path(one.__file__) for one in (findings, run_findings, rank_findings)]
    text = "".join(path.read_text() for path in sources)
    titles = set(re.findall(r"(?:BAD|WARN|INFO)(?: if [^,]+ else \w+)?,\s+\"([A-Z][^\"]+)\"", text))
    titles |= {title for _, title, _ in WARNED.values()} | set(CASES)
    assert len(titles) >= 18
    table = Path(__file__).parents[2].joinpath("docs", "seeing.md").read_text()
    assert [title for title in titles if title not in table] == []


def test_a_streak_is_the_longest_unbroken_one():
    made = Signal(tuple(range(10, 20)), (1, 1, 0, 1, 1, 1, 0, 1, 1, 1))
    assert made.streak(lambda value: value > 0, 3) == (13, 15)
    assert made.streak(lambda value: value > 0, 4) is None
    assert made.smooth(3).steps == tuple(range(12, 20)) and made.smooth(3).values[0] == 1
    assert made.at(12) == 0 and made.at(9) is None and not Signal((), ())
