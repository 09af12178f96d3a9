"""Replies of the environment in real processes: ready out of order, hanging, crashing, no text.

Each starts a fresh Python, 0.3 s; those that hang wait for the limit. 25 s in all.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mesh.config.schema import Conf, RewardConf
from mesh.program.plan import task_spec
from mesh.tasks import TaskSpec, load_task
from mesh.tasks.calls import Replied, TaskSource
from mesh.tasks.response import Response, Score
from mesh.tasks.scorer import Scorer, checked_task, scoring_of
from mesh.types import Prompt, TurnText

PROMPT = Prompt(0, "abc>", "cba")
MESSAGES = [{"role": "system", "content": "Be\nbrief."}, {"role": "user", "content": "abc?"}]
CHAT = Prompt(0, "", "cba", messages=MESSAGES, prefill="<a>")
LIMIT = 3.0  # longer than a busy machine takes for a reply that does not hang
WAIT = 60.0
FORMS = "a reply is a text, a message, several messages, or None, which ends the conversation"


@pytest.fixture
def scorer(tmp_path: Path) -> Iterator[Callable[..., Scorer]]:
    """Makes scorers of a task of `user_tasks`."""
    made: list[Scorer] = []

    def make(name: str = "Obliging", **reward) -> Scorer:
        args = {"notes": str(tmp_path)} if name == "Obliging" else {}
        reward = {"timeout_seconds": LIMIT} | reward
        conf = Conf(task=f"user_tasks:{name}", task_args=args, reward=RewardConf(**reward))
        source = TaskSource(load_task(conf.task, 0, args), task_spec(conf), scoring_of(conf))
        made.append(Scorer(source))
        return made[-1]

    yield make
    for one in made:
        one.close()


def said(*texts: str) -> list[TurnText]:
    """A conversation: sampled turns with replies between."""
    return [TurnText(text, sampled=number % 2 == 0) for number, text in enumerate(texts)]


def collect(scorer: Scorer, num: int) -> list[Replied]:
    found, deadline = [], time.monotonic() + WAIT
    while len(found) < num:
        assert time.monotonic() < deadline
        found += scorer.replies.poll(WAIT)
    assert scorer.replies.num == 0 and scorer.replies.poll(0) == []
    return found


def ask(scorer: Scorer, *texts: str, prompt: Prompt = PROMPT) -> list[Replied]:
    """The replies to conversations of one turn each, in the order of the conversations."""
    for key, text in enumerate(texts):
        scorer.replies.submit(key, prompt, said(text), seed=0)
    return sorted(collect(scorer, len(texts)))


VALUES = {
    '"84"': "84",
    '""': "",
    "null": None,
    "return None": None,
    '{"role": "tool", "content": "8é"}': {"role": "tool", "content": "8é"},
    '[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]': [
        {"role": "user", "content": "a"}, {"role": "user", "content": "b"},
    ],
    "return ({'role': 'tool', 'content': 'x', 'tool_calls': (1, 2)},)": [
        {"role": "tool", "content": "x", "tool_calls": [1, 2]}
    ],
}  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
def test_every_form_of_a_reply_arrives_as_plain_values(scorer, workers):
    found = ask(scorer(workers=workers), *VALUES)
    assert found == [Replied(key, reply, False) for key, reply in enumerate(VALUES.values())]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_reply_knows_prompt_turns_and_seed_or_leaves_the_seed_out(scorer, workers):
    one = scorer(workers=workers)
    one.replies.submit((4, 1), PROMPT, said("a", "b", "seed"), seed=2**63 + 1)
    expected = f"{2**63 + 1} after 3 turns of abc>"
    assert collect(one, 1) == [((4, 1), expected, False)]
    other = scorer("Shouts", workers=workers)
    other.replies.submit("k", PROMPT, said("abc"), seed=5)
    other.replies.submit("l", PROMPT, said("abc", "ABC", "d"), seed=5)
    assert sorted(collect(other, 2)) == [("k", "ABC", False), ("l", None, False)]


def test_a_quick_reply_does_not_wait_for_a_slow_one_and_polling_does_not_block(scorer):
    one = scorer(workers=2)
    deadline = time.monotonic() + WAIT
    while [worker.ready for worker in one.calls.pool.workers] != [True] * 2:
        assert time.monotonic() < deadline
        ask(one, *["nap 9"] * 6)
    one.replies.submit("slow", PROMPT, said("nap 2"), seed=0)  # 0.4 s
    began = time.monotonic()
    assert one.replies.poll(0) == [] and one.replies.poll(0.02) == []
    assert time.monotonic() - began < 0.3
    one.replies.submit("quick", PROMPT, said('"x"'), seed=0)
    assert [key for key, _, _ in collect(one, 2)] == ["quick", "slow"]


def test_processes_work_between_polls_and_waiting_uses_no_cpu(scorer):
    one = scorer(workers=1)
    ask(one, '"warm"')
    one.replies.submit(0, PROMPT, said("nap 8"), seed=0)  # 0.1 s
    assert one.replies.poll(0) == []
    time.sleep(1.0)
    assert one.replies.poll(0) == [(0, "8", False)]
    one.replies.submit(1, PROMPT, said("nap 0"), seed=0)  # 0.5 s
    began, before = time.monotonic(), time.process_time()
    assert one.replies.poll(WAIT) == [(1, "0", False)]
    assert time.process_time() - before < (time.monotonic() - began) / 5


def test_quick_replies_are_queued_and_slow_ones_are_not(scorer):
    """Once it is known how long they take, an engine's step is enough for many quick ones."""
    one = scorer(workers=1)
    ask(one, *['"warm"'] * 20)
    for key in range(20):
        one.replies.submit(key, PROMPT, said('"x"'), seed=0)
    early = len(one.replies.poll(0))  # some may be there already
    time.sleep(0.5)
    assert early + len(one.replies.poll(0)) == 20
    ask(one, *["nap 9"] * 4)
    for key in range(3):
        one.replies.submit(key, PROMPT, said('"x"'), seed=0)
    early = len(one.replies.poll(0))
    time.sleep(0.5)
    found = [key for key, _, _ in one.replies.poll(0)]
    assert early < 2 and found == [early]
    collect(one, 2 - early)


FAULTS = {
    "hang": "hung for 3 s",
    "crash SIGSEGV": "ended its process by signal 11 (SIGSEGV)",
    "exit 3": "ended its process with exit status 3",
    "fail lost": "raised KeyError: 'lost'",
    "leave 3": "raised SystemExit: 3",
    "return 5": f"returned 5 of type int, which is no text; {FORMS}",
    "return b'x'": f"returned b'x' of type bytes, which is no text; {FORMS}",
    "return []": f"returned [] of type list, which holds no message; {FORMS}",
    "return ['x']": f"returned ['x'] of type list, in which 'x' is no message; {FORMS}",
    "return {'role': 'tool', 'content': 84}": "returned {'role': 'tool', 'content': 84} of type "
    "dict, a message whose content is no text: 84; a message is {'role': 'tool', 'content': '84'}",
    "return {'content': 'x'}": "returned {'content': 'x'} of type dict, a message whose role is no "
    "text: None; a message is {'role': 'tool', 'content': '84'}",
    "return {'role': 'a', 'content': 'x', 'at': {1}}": "returned {'role': 'a', 'content': 'x', "
    "'at': {1}} of type dict, which JSON cannot hold (Object of type set is not JSON serializable)",
    "return '\\ud800'": "returned '\\ud800' of type str, which is no text that UTF-8 can hold "
    "('utf-8' codec can't encode character '\\ud800' in position 0: surrogates not allowed)",
}


def test_stop_shows_the_conversation_and_what_happened(scorer):
    one = scorer()
    for fault, happened in FAULTS.items():
        one.replies.submit(0, CHAT, said("twelve?", "12", fault), seed=0)
        one.replies.submit(1, PROMPT, said("nap 0"), seed=0)
        with pytest.raises(ValueError) as caught:
            collect(one, 2)
        assert str(caught.value).splitlines()[:9] == [
            f"the reply function of {one.task!r} {happened}",
            "  system:   'Be\\nbrief.'",
            "  user:     'abc?'",
            "  prefill:  '<a>'",
            "  response: 'twelve?'",
            "  reply:    '12'",
            f"  response: {fault!r}",
            "  answer:   'cba'",
            "make it return a text, a message, several messages, or None at the end, for every "
            "response a model may give, within reward.timeout_seconds=3, or count it as 0.0 "
            "(reward.on_failure=zero)",
        ]
        assert one.replies.num == 0, "the other call is forgotten"
    assert ask(one, '"x"') == [(0, "x", False)]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_zero_ends_the_conversation_and_counts(scorer, workers):
    one = scorer(workers=workers, on_failure="zero")
    faults = [fault for fault in FAULTS if workers or fault.split()[0] in ("fail", "return")]
    texts = [text for fault in faults for text in (fault, '"next"')]
    found = ask(one, *texts)
    assert [reply for _, reply, _ in found] == [None, "next"] * len(faults)
    assert [failed for _, _, failed in found] == [True, False] * len(faults)
    count, example = one.failures()
    assert count == len(faults) and example.startswith("the reply function of Obliging(")
    assert one.failures() == (0, "")


def test_replies_and_scores_share_processes_and_a_score_sees_all_turns(scorer):
    one = scorer()
    assert ask(one, '"x"') == [(0, "x", False)]
    (worker,) = one.calls.pool.workers
    responses = [
        Response("0.5", turns=said("a", "b", "0.5")),
        Response("fail lost", turns=said("a", "b", "fail lost")),
    ]
    assert one.score([PROMPT], responses[:1]) == [Score(0.5)]
    assert one.calls.pool.workers == [worker]
    with pytest.raises(ValueError) as caught:
        one.score([PROMPT], responses[1:])
    assert str(caught.value).splitlines()[1:6] == [
        "  prompt:   'abc>'",
        "  response: 'a'",
        "  reply:    'b'",
        "  response: 'fail lost'",
        "  answer:   'cba'",
    ]


def test_a_process_that_is_killed_between_two_replies_is_replaced(scorer, tmp_path):
    one = scorer(on_failure="zero")
    assert ask(one, "note a")[0].failed, "0.5 is no text"
    child, _ = map(int, (tmp_path / "a").read_text().split())
    os.kill(child, signal.SIGKILL)
    time.sleep(0.5)
    assert one.failures()[0] == 1
    assert ask(one, '"x"') == [(0, "x", False)] and one.failures() == (0, "")


def test_parameters_that_no_call_can_fill_are_refused_at_the_start():
    checked_task(TaskSpec("user_tasks:Shouts", 0), workers=0)
    checked_task(TaskSpec("user_tasks:Obliging", 0), workers=0)
    with pytest.raises(ValueError) as caught:
        checked_task(TaskSpec("user_tasks:AsksForMore", 0), workers=0)
    assert str(caught.value) == (
        "task=user_tasks:AsksForMore: its method reply cannot be called as reply(prompt, turns), "
        "nor with seed=... (missing a required argument: 'mood'); give it these parameters"
    )
