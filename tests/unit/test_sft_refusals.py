"""Words that recipes/sft.py refuses before it makes a run directory or a model."""

from __future__ import annotations

import re

import pytest
from small_trainer import conf_of

from mesh.lifecycle.guard import REFUSED
from mesh.program.checks import conf_problems
from mesh.program.loss_checks import read_loss
from mesh.recipes.sft import main, supervised
from mesh.rl.losses import LOSSES


@pytest.fixture
def refusal(tmp_path, capsys, unlaunched):
    """refusal(WORD, ...): the lines with which the recipe refuses them on one rank."""

    def lines_of(*words: str) -> list[str]:
        run_dir = tmp_path / "run"
        with pytest.raises(SystemExit) as end:
            main(["conf=qwen3_tiny", *words, f"run_dir={run_dir}"])
        assert end.value.code == REFUSED and not run_dir.exists()
        title, *lines = capsys.readouterr().err.splitlines()
        assert title.endswith("with the configuration:")
        return lines

    return lines_of


def test_words_that_it_does_not_obey(refusal):
    words = ["steps=7", "trainer.lr=5", "kl_coef=0.1", "check=strict", "seed=3"]
    assert refusal(*words, "trainer.warmup_steps=2") == [
        "- steps=7: recipes/sft.py does not read it; set sft.steps",
        "- trainer.lr=5.0: recipes/sft.py does not read it; set sft.lr",
        "- kl_coef=0.1: recipes/sft.py does not read it; leave it out, there is no reference model",
        "- check=strict: recipes/sft.py does not read it; leave it out, there is no generator to "
        "agree with",
    ]


def test_words_of_a_loss(refusal):
    why = "recipes/sft.py does not read it; leave it out, solutions are learned by their cross"
    lines = refusal("loss=dapo", "clip_high=0.3", "importance=tis", "stop.metric=eval/reward")
    assert [line.startswith(f"- {word}: {why}") for line, word in zip(
        lines, ("loss=dapo", "clip_high=0.3", "importance=tis"), strict=False
    )] == [True] * 3  # fmt: skip
    assert len(lines) == 4 and lines[3].startswith("- stop.metric=eval/reward: recipes/sft.py")


def test_the_keys_of_the_run_that_it_prepares_are_no_words():
    """Of a YAML: what they say is left out together with what reads it."""
    words = ["stop.metric=eval/reward", "stop.above=1", "loss=sapo", "loss_args.tau_negative=2",
             "importance=mask", "importance_level=sequence", "updates_per_step=3"]  # fmt: skip
    conf = supervised(conf_of(*words), ["conf=qwen3_tiny"])
    assert conf_problems(conf, "cpu") == [] and read_loss(conf) is LOSSES["grpo"]
    assert (conf.steps, conf.trainer.lr) == (conf.sft.steps, conf.sft.lr)


def test_epochs_and_steps_exclude_each_other(refusal):
    assert refusal("sft.steps=7", "sft.epochs=2") == [
        "- sft.steps=7: sft.epochs=2 says how long to train; leave out one of the two",
    ]


def test_epochs_of_what_has_no_end(refusal):
    """The configuration's own sft.steps is not in the way."""
    (line,) = refusal("sft.epochs=2")
    assert line.startswith("- sft.epochs=2: task=spell_backward draws prompts without end")


def test_what_every_recipe_refuses(refusal):
    (line,) = refusal("model.path=/nope", "sft.steps=7")
    assert line.startswith("- model.path=/nope: no such directory")


def test_an_example_longer_than_the_context(refusal):
    """One that fills it is trained on in distributed/test_programs.py."""
    words = ["generator.max_new_tokens=1", "task_args.min_length=5", "task_args.max_length=5"]
    (line,) = refusal(*words, "model.max_length=11")
    assert re.fullmatch(
        r"- model.max_length=11: the prompt '[a-z]{5}>' has 12 tokens with its solution and the "
        r"end of sequence \(128 of 128 prompts of step 1\); use at least 12, shorter prompts, or "
        "overlong=skip",
        line,
    )
