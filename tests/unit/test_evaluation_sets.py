"""Named evaluation sets: their keys, what is refused, and what they are resolved to.

Half a minute: most tests make a whole plan.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from mesh.config.evaluation_sets import PLACES, as_own, set_confs
from mesh.config.keys import value_of
from mesh.config.loading import load_conf, read_conf, save_conf
from mesh.config.schema import Conf
from mesh.lifecycle.process import Process
from mesh.program.assembly import assemble, check, sync
from mesh.program.plan import Plan
from mesh.recipes.grpo import evaluations
from mesh.tasks.arithmetic import Arithmetic
from mesh.tasks.spell_backward import SpellBackward

FEW = ["eval.num_prompts=8", "eval.num_samples=2"]


def conf_of(*words: str) -> Conf:
    return load_conf(["conf=qwen3_tiny", *FEW, *words])[1]


def plan_of(process: Process, *words: str, num_ranks: int = 1) -> Plan:
    return check(conf_of(*words), replace(process, world_size=num_ranks), training=False)


def refusal(*words: str) -> list[str]:
    with pytest.raises(ValueError) as caught:
        conf_of(*words)
    return [line.removeprefix("- ") for line in str(caught.value).splitlines()[1:]]


@pytest.mark.parametrize(
    ("word", "line"),
    [
        (
            "eval.sets.hard.num_prompt=3",
            "eval.sets.hard.num_prompt=3: unknown key; did you mean eval.sets.hard.num_prompts? a "
            "set has task, task_args, scores, score_weights, num_prompts, num_samples, k, greedy, "
            "temperature, top_k, top_p, max_new_tokens, stop",
        ),
        (
            "eval.sets.hard.num_samples=many",
            "eval.sets.hard.num_samples=many: expected an integer, or null; correct it, or leave "
            "it out",
        ),
        (
            "eval.sets.hard.top_p=0",
            "eval.sets.hard.top_p=0: must be > 0 and <= 1; correct it, or leave it out",
        ),
        (
            "eval.sets.hard.k=[1,0]",
            "eval.sets.hard.k=[1, 0]: must be >= 1; correct it, or leave it out",
        ),
        (
            "eval.sets.task=arithmetic",
            "eval.sets.task=arithmetic: expected a set's name, with keys below it; write "
            "eval.sets.NAME.task",
        ),
        (
            "eval.sets=hard",
            "eval.sets=hard: expected a mapping like {name: value}; write e.g. eval.sets={}",
        ),
        *(
            (
                f"eval.sets.{name}.k=1",
                f"eval.sets.{name}: eval/{name} is a metric of ours, or begins some; give the set "
                "another name",
            )
            for name in ("accuracy", "reward", "response", "failed")
        ),
        (
            "eval.sets={'a b': {k: 1}}",
            "eval.sets.a b: a set's name has letters, digits, _ and - only; rename it",
        ),
    ],
)
def test_a_wrong_key_is_refused_with_key_value_and_remedy(word, line):
    assert refusal(word) == [line]


def test_all_wrong_keys_are_listed_together():
    assert len(refusal("eval.sets.a.x=1", "eval.sets.b.y=2", "steps=0", "eval.sets.c=3")) == 4


def test_keys_have_types_and_come_back_from_a_file(tmp_path):
    conf = conf_of(
        "eval.sets.hard.task=arithmetic", "eval.sets.hard.task_args.digits=3",
        "eval.sets.hard.k=2", "eval.sets.hard.stop=[a,';']", "eval.sets.hard.temperature=0.5",
        "eval.sets.hard.top_p=null", "eval.sets.hard.greedy=false",
    )  # fmt: skip
    hard = set_confs(conf)["hard"]
    assert (hard.task, hard.task_args, hard.k, hard.stop) == (
        "arithmetic", {"digits": "3"}, [2], ["a", ";"],
    )  # fmt: skip
    assert (hard.temperature, hard.top_p, hard.greedy) == (0.5, None, False)
    save_conf(conf, tmp_path / "config.yaml")
    again = read_conf(tmp_path / "config.yaml")
    assert set_confs(again) == set_confs(conf) and as_own(again, hard) == as_own(conf, hard)


def test_a_set_inherits_what_it_does_not_say():
    words = ["task_args.max_length=7", "eval.k=[1,2]", "scores=[a:b]", "score_weights=[2]"]
    conf = conf_of(*words, "eval.sets.same.num_prompts=4", "eval.sets.same.task_args.min_length=6",
                   "eval.sets.other.task=arithmetic", "eval.sets.cold.temperature=0",
                   "eval.sets.more.num_samples=8")  # fmt: skip
    own = {name: as_own(conf, keys) for name, keys in set_confs(conf).items()}
    same, other, cold, more = own["same"], own["other"], own["cold"], own["more"]
    assert (same.task, same.task_args) == ("spell_backward", {"max_length": "7", "min_length": "6"})
    assert (same.eval.num_prompts, same.eval.k, same.scores) == (4, [1, 2], ["a:b"])
    assert (other.task, other.task_args, other.scores, other.score_weights) == (
        "arithmetic", {}, [], [],
    )  # fmt: skip
    assert (cold.eval.num_samples, cold.eval.k, cold.eval.greedy) == (1, [], False)
    assert (more.eval.num_samples, more.eval.k, more.eval.greedy) == (8, [], True)
    for name in PLACES.values():
        if name != "eval.num_prompts":
            assert value_of(same, name) == value_of(conf, name)


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (
            ["eval.k=[1,4]"],
            ["eval.k=[1, 4]: pass@4 needs as many samples, and a prompt has eval.num_samples=2; "
             "use at most 2, or raise eval.num_samples"],
        ),
        (["eval.k=[2,2]"], ["eval.k=[2, 2]: has a k twice; name it once"]),
        (
            ["eval.sets.a.k=3", "eval.sets.b.num_samples=4", "eval.sets.b.k=[1,8]"],
            ["eval.sets.a.k=[3]: pass@3 needs as many samples, and a prompt has "
             "eval.num_samples=2; use at most 2, or raise eval.num_samples",
             "eval.sets.b.k=[1, 8]: pass@8 needs as many samples, and a prompt has "
             "eval.sets.b.num_samples=4; use at most 4, or raise eval.sets.b.num_samples"],
        ),
        (
            ["eval.sets.a.temperature=0", "eval.sets.a.num_samples=2"],
            ["eval.sets.a.num_samples=2: with temperature=0 all answers to a prompt are the same; "
             "leave it out, or set a temperature"],
        ),
        (
            ["eval.sets.a.task=arithmetik"],
            ["eval.sets.a.task=arithmetik: no such task; did you mean arithmetic? use one of "],
        ),
        (
            ["eval.sets.a.task_args.max_lenght=4"],
            ["eval.sets.a.task_args.max_lenght=4: task=spell_backward has no such key; did you "
             "mean eval.sets.a.task_args.max_length?"],
        ),
        (
            ["eval.sets.a.max_new_tokens=40"],
            ["eval.sets.a.max_new_tokens=40: leaves no room for a prompt in model.max_length=32"],
        ),
        (
            ["eval.sets.a.max_new_tokens=30"],
            ["eval.sets.a: model.max_length=32: the prompt '"],
        ),
        (
            ["eval.sets.a.stop=['']"],
            ["eval.sets.a.stop=[]: the empty text would end every response at its first token"],
        ),
        (
            ["eval.sets.a.score_weights=[1,2]"],
            ["eval.sets.a.score_weights=[1.0, 2.0]: it has 2, and scores has 0; give one for each"],
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_the_words_of_the_set(process, words, lines):
    with pytest.raises(ValueError) as caught:
        plan_of(process, *words)
    found = [line.removeprefix("- ") for line in str(caught.value).splitlines()[1:]]
    assert len(found) == len(lines)
    for line, begin in zip(found, lines, strict=True):
        assert line.startswith(begin), line


def test_a_set_has_its_own_task_and_draws(process):
    plan = plan_of(
        process, "eval.sets.sums.task=arithmetic", "eval.sets.sums.num_prompts=4",
        "eval.sets.sums.temperature=0.5", "eval.sets.sums.top_k=5", "eval.sets.sums.stop=;",
        "eval.sets.sums.max_new_tokens=4", "eval.sets.long.task_args.min_length=5",
        "eval.sets.greedy.temperature=0",
    )  # fmt: skip
    own, sums, long, greedy = plan.evaluations.values()
    assert own.draws is None and own.source == plan.training and own.ks == (1, 2)
    assert sums.source.task == Arithmetic(0) and len(sums.prompts) == 4
    assert (sums.draws.temperature, sums.draws.top_k, sums.draws.top_p) == (0.5, 5, 1.0)
    assert sums.draws.max_new_tokens == 4 and sums.draws.stops.strings == (";",)
    assert long.source.task == SpellBackward(0, min_length=5) and long.prompts != own.prompts
    assert min(len(prompt.answer) for prompt in long.prompts) == 5
    assert (greedy.num_samples, greedy.ks, greedy.greedy) == (1, (1,), False)
    assert greedy.source.task is plan.task, "a task is made once"
    texts = {p.question for one in plan.evaluations.values() for p in one.prompts}
    assert plan.prompts.held_out.texts == texts


def test_every_set_is_evaluated_under_one_sync(process):
    """The same set under another name has the same numbers; a set of temperature 0 has those of the
    greedy answers; one sync is enough for all."""
    words = ["eval.sets.same.k=[1,2]", "eval.sets.cold.temperature=0", "eval.k=[1,2]"]
    program = assemble(plan_of(process, *words), process)
    version = sync(program) and program.generator.engine.version
    assert len({id(one) for one in program.evaluation_scorers.values()} | {id(program.scorer)}) == 1
    found = evaluations(program, process, rows=True)
    assert program.generator.engine.version == version
    own, same, cold = (found[name] for name in ("", "same", "cold"))
    assert own.values == same.values and len(own.metrics) == len(same.metrics) == 8
    assert {
        f"eval/same/{k.removeprefix('eval/')}": v for k, v in own.metrics.items()
    } == same.metrics
    assert cold.metrics["eval/cold/accuracy"] == own.metrics["eval/accuracy_greedy"]
    assert [row["greedy"]["response"] for row in own.rows] == [
        row["responses"][0] for row in cold.rows
    ]
    assert "eval/cold/accuracy_greedy" not in cold.metrics and "greedy" not in cold.rows[0]
