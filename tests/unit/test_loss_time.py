"""tools.bench.loss_time: what it times is what the recipe does, for every loss and in turn."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mesh.config.keys import Refusal
from mesh.config.loading import load_conf
from mesh.config.schema import Conf
from mesh.lifecycle.process import Process
from mesh.lifecycle.timers import Phases
from mesh.program.assembly import Program, assemble, check, sync, weights_digest
from mesh.program.groups import groups_of
from mesh.recipes.grpo import train_step
from mesh.rl.losses import LOSSES
from mesh.rl.updates import step_metrics
from mesh.tasks import Draw
from mesh.tasks.prompts import step_prompts
from mesh.types import Outline, Wave
from tools.bench.loss_time import STEP, Timed, bench, half_right, objectives_of, read_words, train
from tools.bench.losses import REWARDED
from tools.bench.timing import in_turn

SMALL = ("num_prompts=8", "group_size=4", "model.max_length=24")


def conf_of(*words: str) -> Conf:
    return load_conf(["conf=qwen3_tiny", *SMALL, *words])[1]


def assembled(conf: Conf, process: Process) -> Program:
    program = assemble(check(conf, process, held_out=False), process)
    sync(program)
    return program


@pytest.mark.parametrize(("loss", "updates"), [("grpo", 1), ("rloo", 2)])
def test_training_is_that_of_the_recipe(loss, updates, process: Process):
    """The same metrics and the same weights, from a plan of another loss with one update."""
    conf = conf_of("trainer.warmup_steps=0", f"loss={loss}", f"updates_per_step={updates}")
    program = assembled(conf, process)
    step = train_step(program, process, Phases(process.device), STEP).metrics
    other = assembled(conf_of("trainer.warmup_steps=0"), process)
    before = weights_digest(other)
    draw = Draw(STEP, other.plan.step.num_prompts)
    prompts, _ = step_prompts(other.plan.prompts, process, draw, other.pass_rates)
    wave = groups_of(other, process, Phases(process.device), STEP, prompts).wave
    objective = objectives_of(conf_of(), [loss])[loss]
    made = train(other, objective, wave, updates)
    assert len(made) == updates and made[0]["grad_norm"] > 0
    assert before != weights_digest(other) == step["digest/weights"]
    assert step_metrics(made).items() <= step.items()


def test_every_loss_has_its_own_objective():
    """With grpo first, and the run's keys in all of them."""
    found = objectives_of(conf_of("kl_coef=0.1", "loss=sapo"), ["gspo", "dapo", "grpo"])
    assert list(found) == ["grpo", "gspo", "dapo"]
    assert [one.kl_coef for one in found.values()] == [0.1] * 3
    assert found["dapo"].settings["clip_high"] == LOSSES["dapo"].settings["clip_high"]
    assert found["gspo"].loss.surrogate is LOSSES["gspo"].surrogate


def test_what_does_not_fit_is_refused_at_once():
    with pytest.raises(Refusal) as refused:
        objectives_of(conf_of("waves=2", "clip_low=0.2"), ["gspo", "grqo"])
    for part in ("3 problems", "waves=2", "clip_low=0.2: the ratio of loss=gspo", "loss=grqo"):
        assert part in str(refused.value)


def test_every_second_rollout_is_right():
    outlines = [Outline(p, s, 3, 5, 0.25, "stop") for p in range(2) for s in range(3)]
    made = half_right(Wave(outlines, []))
    assert [one.reward for one in made.outlines] == [0, 1, 0, 1, 0, 1]
    assert [replace(one, reward=0.25) for one in made.outlines] == outlines


def test_ratios_are_of_the_same_round():
    """A whole step shares what is no training: 3% of it are more of the training."""
    row = Timed("gspo", 1, [1.2, 2.0, 3.3], [1.0, 2.0, 3.0], rest=8.0)
    assert row.ratios() == pytest.approx([1.2, 1.0, 1.1])
    assert row.ratios(8.0) == pytest.approx([9.2 / 9, 1.0, 11.3 / 11])
    assert not row.missed and replace(row, rest=0.0).missed
    assert replace(row, seconds=[0.9, 1.8, 2.7], rest=1.0).missed  # faster is not the same, either


def test_functions_take_turns_after_one_that_warms_up():
    calls: list[str] = []
    times = in_turn(lambda: calls.append("a"), lambda: calls.append("b"), repeats=2)
    assert calls == ["a", "b"] * 3 and [len(taken) for taken in times] == [2, 2]


def test_options_are_ours_and_the_rest_are_keys():
    options, words = read_words(["losses=rloo", "updates=1,4", "seed=3"])
    assert (options["losses"], options["updates"], options["rounds"]) == ("rloo", "1,4", "5")
    assert words[-2:] == ["trainer.lr=1e-12", "seed=3"] and len(words) > 2
    assert read_words(["conf=x", "trainer.lr=1"])[1] == ["conf=x", "trainer.lr=1"]
    assert read_words([])[0]["losses"] == ",".join(REWARDED)
    for wrong in ("rounds=0", "updates=1,x", "optimizer=fused"):
        with pytest.raises(SystemExit):
            read_words([wrong])


def test_the_tables_have_every_loss_its_control_and_both_optimizers(process: Process, capsys):
    conf = conf_of("trainer.lr=1e-12")
    given = {"losses": "cispo,max_rl", "updates": "1,2", "rounds": "1", "optimizer": "true"}
    status = bench(conf, process, given)
    printed = capsys.readouterr().out
    cells = [line.split(" | ") for line in printed.splitlines() if line.startswith("| `")]
    names = ["| `grpo`", "| `cispo`", "| `max_rl`", "| `grpo again`"]
    assert [row[0] for row in cells] == [
        *names * 2, "| `trainer.fused=false`", "| `trainer.fused=true`"
    ]  # fmt: skip
    assert [row[1] for row in cells[:8]] == ["1"] * 4 + ["2"] * 4
    assert all(float(row[2]) > 0 for row in cells[:8])
    assert [row[3] for row in (cells[0], cells[4])] == ["1.000 (1.000 to 1.000)"] * 2
    assert ("not within 3% of grpo: none" in printed) == (status == 0)
