"""What the start finds by calling a task's `reply` and `score` once with an empty answer."""

from __future__ import annotations

import pytest
from chat_tokenizer import CHATML, saved

from mesh.config.keys import Refusal
from mesh.config.loading import load_conf
from mesh.program.assembly import check
from mesh.tasks.calls import REMEDIES
from mesh.tasks.replying import FORMS

WORDS = ["conf=qwen3_tiny", "num_prompts=4", "eval.num_prompts=4"]
ASKED = "asked at the start with an empty answer"
NUMBER = "reply returned 5 of type int, which is no text"
RAISED = "reply raised KeyError: 'lost' ("


def started(process, task: str, *words: str):
    _, conf = load_conf([*WORDS, f"task=talking_tasks:{task}", *words])
    return check(conf, process)


def refused(process, task: str, *words: str) -> list[str]:
    with pytest.raises(Refusal) as caught:
        started(process, task, *words)
    return [line.removeprefix("- ") for line in str(caught.value).splitlines()[1:]]


@pytest.mark.parametrize("workers", [0, 1])
def test_what_no_run_could_use_is_refused_with_all_other_problems(process, workers):
    found = refused(process, "Hasty", "task_args.replies=number", "task_args.scores=mean",
                    f"reward.workers={workers}", "generator.stop=['']")  # fmt: skip
    reply, score, other = found
    assert reply == (f"task=talking_tasks:Hasty: {NUMBER}; {FORMS}, {ASKED}; {REMEDIES['reply']}")
    assert score == (
        "task=talking_tasks:Hasty: score returned a Score of which a part is called 'mean', but "
        f"reward/mean is a metric of ours; rename the part, {ASKED}; {REMEDIES['score']}"
    )
    assert other.startswith("generator.stop=")


def test_a_reply_that_the_tokenizer_cannot_write_is_refused(process, tmp_path):
    (foreign,) = refused(process, "Foreign")
    assert foreign.startswith("task=talking_tasks:Foreign: reply returned '\N{SNOWMAN}': ")
    (messages,) = refused(process, "Messages")
    assert "returned {'role': 'user', 'content': 'again'}: the tokenizer in" in messages
    assert f"has no chat template, and the prompt is a chat, {ASKED}; add chat_templ" in messages
    fails = saved(tmp_path / "fails", CHATML + "{{ raise_exception('no') if messages[2:] }}")
    (line,) = refused(process, "Messages", f"model.tokenizer={fails}")
    assert "it fails on these messages: TemplateError: no" in line
    started(process, "Messages", f"model.tokenizer={saved(tmp_path / 'chat', CHATML)}")


@pytest.mark.parametrize("workers", [0, 1])
def test_what_raises_may_take_any_other_answer_and_is_warned_about(process, capsys, workers):
    words = ["task_args.replies=fail", "task_args.scores=fail", f"reward.workers={workers}"]
    started(process, "Hasty", *words)
    reply, score = capsys.readouterr().out.splitlines()
    assert reply.startswith(f"warning: task=talking_tasks:Hasty: {RAISED}")
    assert "talking_tasks.py, line " in reply and "it would end the run; make it" in reply
    assert "score raised ValueError: an answer is needed (" in score
    assert reply.endswith(", or count it as 0.0 (reward.on_failure=zero)")


def test_where_failures_count_as_0_nothing_is_refused(process, capsys):
    words = ["task_args.replies=number", "task_args.scores=number", "reward.workers=0"]
    started(process, "Hasty", *words, "reward.on_failure=zero")
    reply, score = capsys.readouterr().out.splitlines()
    assert NUMBER in reply and "score returned '5' of type str, which is no real" in score
    assert "which a model may give: it would count as 0.0; make it return" in reply
    assert "on_failure" not in reply + score


def test_a_task_without_faults_is_not_mentioned_and_remembers_nothing(process, capsys):
    plan = started(process, "Hasty", "reward.workers=0")
    assert plan.task.asked == [] and capsys.readouterr().out == ""


def test_a_call_that_hangs_ends_at_its_limit(process, capsys):
    words = ["task_args.seconds=60", "reward.timeout_seconds=0.3"]
    started(process, "Chatty", *words)
    out = capsys.readouterr().out
    assert "reply hung for 0.3 s (" in out and "talking_tasks.py, line 2" in out
