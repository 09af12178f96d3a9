"""What trackers show of samples: which, how much of them, and that hostile text stays text."""

from __future__ import annotations

import random
from html.parser import HTMLParser

import pytest
from tensorboard.plugin_util import markdown_to_safe_html

from mesh.runs.excerpts import COLUMNS, MOST_ROWS, as_markdown, cut, excerpts, table_is_due

HOSTILE = [
    "<script>alert(1)</script>", "</code></pre><img src=http://a/b>", "![a](http://a/b.png)",
    "```\n# a\n```", "~~~\n![a](http://a/b.png)\n~~~", "<!-- open", "-->\n![a](http://a/b.png)",
    "<!DOCTYPE a\n<![CDATA[ b", "<div>\n\n![a](http://a/b.png)\n", "a\n\n\n# b\n\n- c\n\n    d",
    "[a]: http://a/b\n[a]", "\u2028![a](http://a/b.png)\u2029# b",
    "\x85# a\x0b# b\x0c# c\r# d\r\n# e",
    "\x02wzxhzdk:0\x03\x02klzzwxh:0001\x03", "&lt;a&amp; &#60;", "\u202eabc", "\ud800 a", "\x00",
    "\t# a\n\t\t![](http://a)", "<?php\n# a", "`a` | b\n--|--\n1|2", "> a", "* * *\n===\n---", "",
    "\U0001f600" * 9, "    \n\n\n\n![](http://a)", "a" * 100_000,
]  # fmt: skip


def row(prompt_id: int, sample_id: int, reward: float, **more) -> dict:
    texts = {"prompt": f"question {prompt_id}", "response": f"answer {sample_id}"}
    numbers = {"step": 3, "prompt_id": prompt_id, "sample_id": sample_id, "reward": reward}
    return numbers | texts | {"length": 4, "finish_reason": "stop"} | more


class Page(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, list]] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, attributes))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_best_and_worst_of_the_best_and_the_worst_group():
    rewards = {4: [0.5, 0.5, 0.5], 7: [0.0, 1.0, 1.0], 9: [0.0, 0.25, 0.0], 5: [0.25, 0.25, 0.25]}
    rows = [row(p, s, r) for p, own in rewards.items() for s, r in enumerate(own)]
    found = [(r["prompt_id"], r["sample_id"], r["reward"]) for r in excerpts(rows)]
    assert found == [(7, 1, 1.0), (7, 0, 0.0), (9, 1, 0.25), (9, 2, 0.0)]
    assert excerpts(reversed(rows)) == excerpts(rows)
    assert [r["prompt_id"] for r in excerpts(rows[:3])] == [4, 4]
    assert excerpts([]) == []


def test_two_prompts_of_each_evaluation_set_by_their_greedy_answers():
    held = [
        row(p, s, 0.0, split="eval", set=name)
        for name in ("easy", "", "hard") for p in (8, 2, 5) for s in (0, -1, 1)
    ]  # fmt: skip
    found = [(r["set"], r["prompt_id"], r["sample_id"]) for r in excerpts(held)]
    assert found == [(name, p, -1) for name in ("", "easy", "hard") for p in (2, 5)]
    trained = [row(p, s, s) for p in (1, 2) for s in range(2)]
    assert len(excerpts([*held, *trained])) == MOST_ROWS
    assert [r["split"] for r in excerpts([*held, *trained])] == [None] * 4 + ["eval"] * 4


def test_an_excerpt_has_the_text_that_the_model_saw_within_a_bound():
    (found,) = excerpts(
        [row(1, 0, 0.5, prompt_text="<|user|>1+1", response="a" * 5000 + "b" * 5000)]
    )
    assert list(found) == list(COLUMNS)
    assert found["prompt"] == "<|user|>1+1" and found["advantage"] is None
    assert found["response"] == "a" * 1000 + " [... 8,000 characters ...] " + "b" * 1000
    assert cut("abcdef", 6) == "abcdef" and cut("abcdefg", 4) == "ab [... 3 characters ...] fg"


def test_a_conversation_is_shown_with_all_its_turns():
    said = [("<call>1+1", True), ("2", False), ("It is 2.", True)]
    turns = [{"text": text, "sampled": sampled, "num_tokens": 3} for text, sampled in said]
    (found,) = excerpts([row(1, 0, 0.5, response="It is 2.", turns=turns)])
    assert found["response"] == "[model] <call>1+1\n[reply] 2\n[model] It is 2."


def test_hostile_text_is_shown_as_text_by_tensorboard():
    """In its own conversion of Markdown to HTML, alone and in all sorts of neighbourhoods."""
    draw = random.Random(1)
    texts = [[text] for text in HOSTILE]
    texts += [draw.choices(HOSTILE[:-1], k=3) for _ in range(200)]
    for parts in texts:
        text = draw.choice(["", "\n", " "]).join(parts)
        shown = excerpts([row(1, 0, 0.5, prompt=text, response=text[::-1]), row(1, 1, 0.5)])
        page = Page(markdown_to_safe_html(as_markdown(shown)))
        assert page.tags == [("pre", []), ("code", [])], text
        text_of = "".join(page.text.split())
        for one in shown:
            for held in (one["prompt"], one["response"]):
                assert "".join(held.split()) in text_of, text
                held.encode()  # no lone surrogate is left


def test_headings_of_a_sample():
    shown = excerpts([row(1, 0, 0.5, split="train", chosen="best", set="", advantage=-0.5)])
    assert as_markdown(shown).splitlines() == [
        "    step 3  split train  chosen best  prompt_id 1  sample_id 0  reward 0.5  "
        "advantage -0.5  length 4  finish_reason stop",
        *("    ", "    PROMPT", "    question 1", "    ", "    RESPONSE", "    answer 0"),
    ]


@pytest.mark.parametrize(
    ("steps", "tables"), [(1, 2), (60, 61), (100, 101), (1000, 102), (1050, 98)]
)
def test_a_run_has_about_a_hundred_tables(steps, tables):
    due = [step for step in range(steps + 1) if table_is_due(step, steps)]
    assert len(due) == tables and due[:2] == [0, 1] and due[-1] == steps
