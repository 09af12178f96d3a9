"""Running pass rates: by hand, what they leave out of a draw, and what a checkpoint holds of them.

Whole runs: faults/test_refill_runs.py. Costs 4 seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from test_checkpoint import advance, conf_of, names_in, trainer_of
from test_prompts import source
from test_rescue import rescued

from mesh.checkpoint.keeper import Checkpointer
from mesh.checkpoint.pass_rates import FILE, read_rates, write_rates
from mesh.checkpoint.same_run import Inputs
from mesh.config.loading import load_conf
from mesh.lifecycle.process import Process
from mesh.program.plan import difficulty_bounds
from mesh.rl.samples import StepRecord
from mesh.runs.warnings import StepWarnings
from mesh.tasks import Draw
from mesh.tasks.difficulty import MAX_ROUNDS, Bounds, Offers, PassRates, name_of
from mesh.tasks.prompts import digest_of, step_prompts
from mesh.tasks.spell_backward import SpellBackward
from mesh.types import Prompt


@dataclass(frozen=True)
class Letters(SpellBackward):
    """Letters of the alphabet in turn: prompt `index` of a round is `index + shift * round`."""

    num: int = 26
    shift: int = 4

    def train_prompts(self, step: int, num: int, round: int = 0) -> list[Prompt]:
        letters = [chr(ord("a") + (i + self.shift * round) % self.num) for i in range(num)]
        return [Prompt(i, f"{letter}>", letter) for i, letter in enumerate(letters)]


def rates_of(bounds: Bounds, **rates: float) -> PassRates:
    """What is known after step 0, by the letter."""
    known = PassRates(bounds)
    known.restore({name_of(f"{letter}>"): (rate, 0) for letter, rate in rates.items()})
    return known


def test_a_rate_is_the_mean_of_the_last_visit_and_the_rate_before():
    rates = PassRates(Bounds())
    assert rates.rate("a>", 0) is None
    rates.add(0, [("a>", 1, 4), ("b>", 4, 4)])
    rates.add(1, [("a>", 3, 4)])
    assert rates.rate("a>", 2) == (1 / 4 + 3 / 4) / 2
    rates.add(2, [("a>", 4, 4), ("a>", 0, 4), ("c>", 0, 8)])
    assert rates.rate("a>", 3) == (1 / 2 + 4 / 8) / 2, "twice in a step is one visit"
    assert (rates.rate("b>", 3), rates.rate("c>", 3), len(rates.known)) == (1.0, 0.0, 3)


def test_what_was_not_drawn_for_long_is_forgotten_and_not_kept():
    rates = PassRates(Bounds(forget=2))
    rates.add(5, [("a>", 4, 4)])
    rates.add(6, [("b>", 4, 4)])
    assert [rates.rate("a>", step) for step in (6, 7, 8)] == [1.0, 1.0, None]
    rates.add(8, [("c>", 4, 4)])
    assert len(rates.known) == 2 and name_of("a>") not in rates.known
    rates.add(9, [("b>", 0, 4)])
    assert rates.rate("b>", 9) == 0.0, "as one that was never seen"


def test_both_bounds_are_drawn_and_the_unknown_is():
    rates = rates_of(Bounds(0.25, 0.75), a=0.2, b=0.25, c=0.5, d=0.75, e=0.8)
    prompts = Letters(0).train_prompts(1, 6)
    assert rates.unfit(prompts, 1) == [0, 4]
    assert PassRates().unfit(prompts, 1) == []


def test_prompts_that_are_too_easy_are_replaced_in_their_places_by_later_rounds(process):
    """By hand: b and c are easy; round 1 has e, which is easy, and f for them; round 2 has i."""
    rates = rates_of(Bounds(0.0, 0.5), b=1.0, c=0.6, e=0.9, i=0.5)
    made, metrics = step_prompts(source(Letters(0)), process, Draw(3, 4), rates)
    assert "".join(p.prompt.answer for p in made) == "aifd"
    assert [p.prompt_id for p in made] == [0, 1, 2, 3]
    first = Letters(0).train_prompts(3, 4)
    assert metrics == {
        "digest/prompts": digest_of(first), "difficulty/skipped": 3.0, "difficulty/waived": 0.0,
    }  # fmt: skip


def test_what_is_too_easy_is_drawn_where_there_is_nothing_else(process):
    rates = rates_of(Bounds(0.0, 0.5), a=1.0, b=1.0)
    offers = Offers(Letters(0, num=2, shift=1), Draw(3, 2), rates)
    assert sorted({p.answer for p in offers.take(2)}) <= ["a", "b"]
    assert (offers.waived, offers.rounds) == (2, MAX_ROUNDS)
    assert offers.metrics["difficulty/skipped"] == 2.0 * (MAX_ROUNDS - 1)
    warnings = StepWarnings()
    (line,) = warnings.see(4, offers.metrics)
    assert line.startswith("warning: step 4 has 2 prompts that difficulty.min and difficulty.max")
    assert warnings.see(5, {"difficulty/waived": 0.0}) == warnings.see(6, offers.metrics) == []


def test_keys_become_bounds():
    def bounds(*words: str) -> Bounds | None:
        return difficulty_bounds(load_conf(["conf=qwen3_tiny", *words])[1])

    assert bounds() is None
    assert bounds("difficulty.max=0.9") == Bounds(0.0, 0.9)
    assert bounds("difficulty.min=0.1", "difficulty.forget=7") == Bounds(0.1, 1.0, 7)


def test_rates_keep_their_bits_in_a_file(tmp_path):
    known = {name_of("a>"): (0.1 + 0.2, 3), name_of("b>"): (1 / 3, 0)}
    entry = write_rates(known, tmp_path / FILE)
    assert read_rates(tmp_path, {FILE: entry}) == known and entry.bytes > 60
    assert read_rates(tmp_path, {}) == {}


def kept_by(process: Process, path: Path, rates: PassRates, every: int) -> Checkpointer:
    """A run of two steps, whose questions were answered rightly in the first one."""
    conf = conf_of(f"checkpoint.every={every}", "on_nonfinite=stop")
    path.mkdir()
    for name in ("metrics.jsonl", "samples.jsonl.gz"):
        (path / name).touch()
    trainer = trainer_of(conf)
    keeper = Checkpointer(conf, path, process, trainer, Inputs(), rates)
    for step in (1, 2):
        advance(trainer, step)
        rates.add(step - 1, [("a>", 4 // step, 4)])
        keeper.trained(step, StepRecord({}))
        keeper.after(step, stop=every > 0 and step == 2)
    return keeper


def loaded(process: Process, path: Path, rates: PassRates) -> PassRates:
    conf = replace(conf_of("checkpoint.every=0", "on_nonfinite=stop"), resume=str(path))
    Checkpointer(conf, path, process, trainer_of(conf), Inputs(), rates).load()
    return rates


@pytest.mark.parametrize("fails", [False, True], ids=["written", "rescued"])
def test_a_checkpoint_holds_the_rates_of_its_step(process, tmp_path, fails):
    """A run that fails within the next step saves what it knew before that."""
    path, rates = tmp_path / "run", PassRates(Bounds())
    keeper = kept_by(process, path, rates, every=0 if fails else 2)
    rates.add(2, [("b>", 0, 4)])
    if fails:
        assert rescued(keeper).endswith("continues after step 2")
    assert names_in(path) == ["step-2"]
    again = loaded(process, path, PassRates(Bounds()))
    assert again.known == {name_of("a>"): ((1.0 + 0.5) / 2, 1)}


def test_a_run_without_bounds_has_no_such_file(process, tmp_path):
    path = tmp_path / "run"
    kept_by(process, path, PassRates(), every=2)
    assert not (path / "checkpoints" / "step-2" / FILE).exists()
