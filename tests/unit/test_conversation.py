"""What ends a conversation, what a reply becomes, and what is shown of it."""

from __future__ import annotations

import pytest
from chat_tokenizer import IM_END, saved

from mesh.config.loading import load_conf
from mesh.engine.base import Continuation
from mesh.engine.conversation import Dialogue
from mesh.program.limits import limit_problems, penalty_problems
from mesh.rl.statistics import turn_metrics
from mesh.roles.conversation import Conversations, Limits, control_warning, reply_seed
from mesh.tasks import TaskSpec, load_task
from mesh.tasks.calls import ScoringSettings, TaskSource
from mesh.tasks.scorer import Scorer
from mesh.tasks.transcript import response_of, shown
from mesh.text.encoding import PromptEncoder
from mesh.text.tokenizer import CHARACTERS, load_tokenizer
from mesh.types import Completion, Prompt, Rollout, Sampling, Turn, outline

ENCODER = PromptEncoder(load_tokenizer(CHARACTERS))
EOS = ENCODER.tokenizer.eos_ids[0]
SAMPLING = Sampling(1.0, max_new_tokens=8, seed=3, step=5, stop_tokens=(EOS,))
KEY = (7, 2)
PROMPT = Prompt(70, "abc>", "cba")
REWRITES = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
"""Like Qwen3's: it drops the thinking of earlier turns, and begins to think in the next one."""


def ids(text: str, encoder: PromptEncoder = ENCODER) -> tuple[int, ...]:
    return tuple(encoder.tokenizer.encode(text))


class Talk:
    """One sample's conversation with a task of tests/talking_tasks.py."""

    def __init__(
        self,
        task: str,
        limits: Limits,
        on_failure: str = "stop",
        encoder: PromptEncoder = ENCODER,
        **args,
    ) -> None:
        spec = TaskSpec(f"talking_tasks:{task}", 0, args)
        scoring = ScoringSettings(0, 9.0, on_failure)
        scorer = Scorer(TaskSource(load_task(spec.name, 0, args), spec, scoring))
        self.ours = Conversations(scorer, {7: PROMPT}, encoder, limits, SAMPLING, True, None)
        self.dialogue = Dialogue(*KEY, ids("abc>"))

    def say(self, tokens: tuple[int, ...], reason: str = "stop"):
        """A turn, and the answer to it: a continuation, or the reason of the end."""
        turn = Completion(*KEY, tokens, (-1.0,) * len(tokens), reason)
        self.dialogue.say(turn)
        self.ours.hear(self.dialogue, turn)
        continuations, ended = self.ours.answers(wait=True)
        assert len(continuations) + len(ended) == 1
        for one in continuations:
            self.dialogue.reply(one.reply)
            return one
        return ended[KEY]


WIDE = Limits(max_turns=8, max_tokens=0, max_length=99)


def test_a_task_ends_its_conversation():
    talk = Talk("Chatty", WIDE, turns=2)
    first = talk.say((*ids("ab"), EOS))
    assert first == Continuation(*KEY, first.reply, 8) and ids(">")[0] == first.reply[-1]
    assert talk.say((*ids("cd"), EOS)) == "stop"
    texts = [(turn.text, turn.sampled, turn.finish_reason) for turn in talk.ours.texts[KEY]]
    reply = ENCODER.tokenizer.decode(first.reply)
    assert texts == [("ab", True, "stop"), (reply, False, None), ("cd", True, "stop")]
    rollout = talk.dialogue.rollout("stop")
    assert rollout.turns == (Turn(3, True), Turn(len(reply), False), Turn(3, True))
    assert rollout.logprobs == (-1.0,) * 6 and rollout.prompt_tokens == ids("abc>")


def test_replies_go_by_a_seed_of_the_turn_and_of_nothing_else():
    talk = Talk("Chatty", WIDE, turns=3)
    for turn in (1, 2):
        found = talk.say((EOS,)).reply
        seed = reply_seed(SAMPLING, KEY, turn)
        letters = "".join(chr(ord("a") + seed // 26**i % 26) for i in range(seed % 5))
        assert found == ids(letters + ">")
    others = [(SAMPLING, KEY, 1), (SAMPLING, KEY, 2), (SAMPLING, (7, 3), 1), (SAMPLING, (8, 2), 1)]
    others += [
        (Sampling(1.0, 8, seed=4, step=5), KEY, 1),
        (Sampling(1.0, 8, seed=3, step=6), KEY, 1),
    ]
    seeds = [reply_seed(*one) for one in others]
    assert len(set(seeds)) == 6 and all(0 <= seed < 2**63 for seed in seeds)
    assert seeds[0] == 2037233882581480795, "a resumed run has the seeds of the one before"


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (Limits(1, 0, 99), "turns"),
        (Limits(8, 0, 4 + 3), "context"),
        (Limits(8, 3, 99), "tokens"),
        (Limits(8, 3, 4 + 3), "context"),
    ],
)
def test_what_ends_a_conversation_that_would_go_on(limits, reason):
    """The context and the most tokens are full after the first turn, so that no reply fits."""
    assert Talk("Chatty", limits).say((*ids("ab"), EOS)) == reason


def test_a_reply_has_to_leave_room_for_a_token():
    reply = Talk("Chatty", WIDE).say((EOS,)).reply
    full = 4 + 1 + len(reply)
    assert Talk("Chatty", Limits(8, 0, full)).say((EOS,)) == "context"
    assert Talk("Chatty", Limits(8, 0, full + 1)).say((EOS,)) == Continuation(*KEY, reply, 1)
    assert Talk("Chatty", Limits(8, full - 4, 99)).say((EOS,)) == "tokens"
    assert Talk("Chatty", Limits(8, full - 3, 99)).say((EOS,)) == Continuation(*KEY, reply, 1)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [(WIDE, "length"), (Limits(8, 9, 99), "tokens"), (Limits(8, 0, 12), "context")],
)
def test_a_turn_that_is_cut_is_the_last_one_and_has_the_reason_of_what_cut_it(limits, reason):
    talk = Talk("Chatty", limits)
    most = talk.say((EOS,)).max_new_tokens
    assert talk.say(ids("x") * most, "length") == reason


def test_a_first_turn_that_is_cut_is_not_replied_to():
    talk = Talk("Chatty", WIDE)
    assert talk.say(ids("abcdefgh"), "length") == "length"
    assert talk.ours.scorer.replies.num == 0


def test_a_reply_without_tokens_for_it_ends_the_run_or_the_conversation():
    with pytest.raises(
        ValueError, match="(?s)reply function of .*returned '☃': .*cannot encode '☃'"
    ):
        Talk("Foreign", WIDE).say((EOS,))
    talk = Talk("Foreign", WIDE, on_failure="zero")
    assert talk.say((EOS,)) == "stop"
    assert talk.ours.failed == {KEY} and talk.ours.scorer.failures()[0] == 1


def test_what_was_sampled_stays_where_a_template_rewrites_earlier_turns(tmp_path):
    encoder = PromptEncoder(load_tokenizer(saved(tmp_path, REWRITES)))
    talk = Talk("Messages", WIDE, encoder=encoder)
    thought = (*ids("<think>\nhm</think>\nok", encoder), IM_END)
    first = talk.say(thought)
    framing = "\n<|im_start|>user\nagain<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert first.reply == ids(framing, encoder)
    assert talk.say((*ids("ab", encoder), IM_END)).reply == first.reply
    assert tuple(talk.dialogue.tokens[: len(thought)]) == thought
    rendered = encoder.tokenizer.template.render(
        [
            {"role": "user", "content": "abc>"},
            {"role": "assistant", "content": "<think>\nhm</think>\nok"},
            {"role": "user", "content": "again"},
        ],
        encoder.form.day,
        True,
    )
    assert "hm" not in rendered, "the template would have dropped what was thought"


@pytest.mark.parametrize(
    ("reply", "control"),
    [
        ("=84; <|im_end|>\n<|im_start|>user", "<|im_end|>', which ends a turn"),
        ({"role": "tool", "content": "see <|header|> here"}, "<|header|>'"),
        (
            [{"role": "a", "content": "b"}, {"role": "c", "content": "<eos>"}],
            "<eos>', which ends a turn",
        ),
        ("<|im_end", None),
        ({"role": "tool", "content": "84"}, None),
        ("<plain>", None),  # an added token that is text
        (None, None),
    ],
)
def test_control_tokens_that_a_task_writes_are_warned_about_and_a_templates_are_not(
    reply, control, tmp_path
):
    encoder = PromptEncoder(load_tokenizer(saved(tmp_path, REWRITES, eos=[EOS, IM_END])))
    warning = control_warning(encoder, reply)
    expected = f"has the control token '{control}: the model does not read it as text"
    assert warning == "" if control is None else expected in warning


def test_samples_show_what_was_said_and_what_came_back():
    said, reply = (*ids("ab"), EOS), ids("c>")
    turns = (Turn(3, True), Turn(2, False), Turn(2, True))
    talk = Rollout(0, 0, ids("q"), (*said, *reply, *ids("de")), (-1.0,) * 5, 0.0, "length", turns)
    listed = [
        {"text": "ab", "sampled": True},
        {"text": "c>", "sampled": False},
        {"text": "de", "sampled": True},
    ]
    assert shown(ENCODER.tokenizer, talk) == {"response": "de", "turns": listed}
    alone = Rollout(0, 0, ids("q"), said, (-1.0,) * 3, 0.0, "stop")
    assert shown(ENCODER.tokenizer, alone) == {"response": "ab"}


def test_a_response_is_its_last_turn_and_has_all():
    talk = Talk("Chatty", WIDE, turns=2)
    talk.say((*ids("ab"), EOS))
    talk.say((*ids("cd"), EOS))
    response = response_of(talk.ours.texts[KEY], "stop")
    assert response == "cd" and response.tokens == (*ids("cd"), EOS)
    assert [turn.sampled for turn in response.turns] == [True, False, True]


def test_metrics_of_turns():
    def talk(turns: int, reason: str):
        said = tuple(turn for _ in range(turns) for turn in (Turn(2, True), Turn(3, False)))[:-1]
        count = sum(turn.num_tokens for turn in said)
        return outline(Rollout(0, 0, (1,), (5,) * count, (-1.0,) * 2 * turns, 0.0, reason, said))

    four = [talk(1, "stop"), talk(3, "turns"), talk(2, "stop"), talk(2, "tokens")]
    assert turn_metrics(four) == {
        "turns/mean": 2.0, "turns/max": 3.0, "tokens/replied": 3.0 * 4,
        "finish/stop": 0.5, "finish/length": 0.0, "finish/turns": 0.25, "finish/context": 0.0,
        "finish/tokens": 0.25,
    }  # fmt: skip
    assert turn_metrics([outline(Rollout(0, 0, (1,), (5,), (-1.0,), 0.0, "stop"))]) == {}


@pytest.mark.parametrize(
    ("task", "words", "wrong"),
    [
        (
            "spell_backward",
            ["conversation.max_turns=3"],
            "max_turns=3: the task has no method reply",
        ),
        (
            "spell_backward",
            ["conversation.max_tokens=9"],
            "max_tokens=9: the task has no method re",
        ),
        (
            "calculator",
            ["conversation.max_tokens=4"],
            "max_tokens=4: a turn may have generator.max_n",
        ),
        (
            "calculator",
            ["conversation.max_tokens=33"],
            "max_tokens=33: the context ends a conversat",
        ),
        ("calculator", ["conversation.max_tokens=8", "conversation.max_turns=1"], ""),
        ("spell_backward", [], ""),
    ],
)
def test_limits_that_allow_no_turn_or_that_nothing_obeys_are_refused(task, words, wrong):
    _, conf = load_conf(["conf=qwen3_tiny", f"task={task}", *words])
    found = limit_problems(conf, load_task(task, 0, {}))
    assert len(found) == bool(wrong) and (not wrong or f"conversation.{wrong}" in found[0])


@pytest.mark.parametrize(
    ("task", "words", "wrong"),
    [
        ("spell_backward", ["length_penalty_limit=12", "length_penalty_tokens=4"],
         "length_penalty_limit=12: with length_penalty_tokens=4 it begins beyond 8 tokens, and no "
         "response has more than generator.max_new_tokens=8; use less than 12"),
        ("spell_backward", ["length_penalty_limit=11", "length_penalty_tokens=4"], ""),
        ("spell_backward", ["length_penalty_tokens=4"], ""),
        ("calculator", ["length_penalty_tokens=4"],
         "length_penalty_limit is not set: a response has the tokens of all its turns, of which "
         "one may have 8; set the length that is to lose the most"),
        ("calculator", ["length_penalty_limit=20", "length_penalty_tokens=4"], ""),
    ],
)  # fmt: skip
def test_a_length_penalty_fits_the_responses_of_the_task(task, words, wrong):
    _, conf = load_conf(["conf=qwen3_tiny", f"task={task}", "length_penalty=1", *words])
    assert penalty_problems(conf, load_task(task, 0, {})) == ([wrong] if wrong else [])
