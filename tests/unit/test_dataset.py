"""`task=dataset`: files in, prompts out, and what is refused with its file, row and column."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mesh.config.keys import Refusal
from mesh.config.loading import load_conf
from mesh.config.text import Text
from mesh.program.assembly import check
from mesh.program.shared import user_code
from mesh.tasks import Draw, data_set, draw_held_out, draw_prompts, load_task
from mesh.tasks.classes import scored_apart
from mesh.tasks.response import Response
from mesh.tasks.spell_backward import SpellBackward
from mesh.types import Prompt

SUMS = [{"prompt": f"{a}+{b}=", "answer": a + b} for a in range(10, 20) for b in range(10)]
CHAT = [
    {"role": "system", "content": "Add."},
    {"role": "user", "content": "1+1"},
    {"role": "assistant", "content": "2"},
]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def made(path: Any, seed: int = 0, name: str = "dataset", **args: Any) -> Any:
    return load_task(name, seed, {"path": path, **args})


@pytest.fixture
def sums(tmp_path) -> Path:
    return write(tmp_path / "sums.jsonl", SUMS)


def texts(prompts: list[Prompt]) -> list[str]:
    return [prompt.text for prompt in prompts]


def test_each_row_is_drawn_once_in_an_epoch_and_a_resumed_run_draws_the_same(sums):
    task = made(str(sums), held_out_rows=20)
    assert len(data_set(task)) == 80
    steps = [draw_prompts(task, Draw(step, 16)) for step in range(10)]
    first = [text for prompts in steps[:5] for text in texts(prompts)]
    second = [text for prompts in steps[5:] for text in texts(prompts)]
    assert sorted(first) == sorted(second) == sorted(texts(data_set(task))) and first != second
    again = made(str(sums), held_out_rows=20)
    assert draw_prompts(again, Draw(7, 16)) == steps[7]
    assert draw_prompts(made(str(sums), 1, held_out_rows=20), Draw(7, 16)) != steps[7]
    in_order = made(str(sums), held_out_rows=20, shuffle=False)
    assert texts(draw_prompts(in_order, Draw(5, 16))) == texts(data_set(in_order)[:16])


def test_refills_are_other_prompts_and_a_function_of_step_round_and_index(sums):
    task = made(str(sums), held_out_rows=20)
    four, two = (draw_prompts(task, Draw(3, num, round=2)) for num in (4, 2))
    assert four[:2] == two and len(set(texts(four))) == 4
    assert texts(draw_prompts(task, Draw(4, 4, round=2))) != texts(four)


def test_held_out_questions_do_not_depend_on_the_seed_and_are_never_trained_on(sums):
    tasks = [made(str(sums), seed) for seed in (0, 1)]
    held = [texts(draw_held_out(task, 10)) for task in tasks]
    assert held[0] == held[1] and len(set(held[0])) == 10  # one in ten
    assert not set(held[0]) & set(texts(data_set(tasks[0])))
    assert len(data_set(tasks[0])) == 90
    with pytest.raises(
        ValueError, match=r"num_prompts=11: the number .* is 10; use eval.num_prompts=10"
    ):
        draw_held_out(tasks[0], 11)


def test_without_a_number_all_that_a_small_set_holds_out_is_evaluated(process, capsys, sums):
    words = ["conf=qwen3_tiny", "task=dataset", f"task_args.path={sums}", "num_prompts=4"]
    plan = check(load_conf(words)[1], process)
    assert len(plan.evaluations[""].prompts) == 10
    line = "eval.num_prompts is unset, and the task holds out 10 prompts: all are evaluated"
    assert line in capsys.readouterr().out.splitlines()
    fewer = check(load_conf([*words, "eval.num_prompts=7"])[1], process)
    assert len(fewer.evaluations[""].prompts) == 7
    assert "eval.num_prompts" not in capsys.readouterr().out
    with pytest.raises(Refusal, match="eval.num_prompts=11: the number of different questions"):
        check(load_conf([*words, "eval.num_prompts=11"])[1], process)


def test_without_a_number_256_are_evaluated_where_there_are_as_many(process, capsys, tmp_path):
    rows = [{"prompt": f"{i}+0=", "answer": str(i)} for i in range(2700)]
    held = made(str(write(tmp_path / "a.jsonl", rows)), held_out_rows=300)
    assert len(draw_held_out(held, None)) == 256 == len(draw_held_out(SpellBackward(0), None))
    check(load_conf(["conf=qwen3_tiny", "num_prompts=4"])[1], process)
    assert "eval.num_prompts" not in capsys.readouterr().out


def test_rows_of_one_question_are_held_out_together_and_counted(tmp_path):
    rows = [{"prompt": f"q{i % 10} ", "answer": str(i)} for i in range(40)]
    task = made(str(write(tmp_path / "a.jsonl", rows)), held_out_rows=3)
    assert len(data_set(task)) == 28 and len({p.text for p in data_set(task)}) == 7
    assert task.notes() == [
        "data: 28 rows to train on, 3 questions held out",
        *[line for line in task.notes() if "21 repeated questions among the rows trained" in line],
        *[line for line in task.notes() if "9 repeated questions among the rows held" in line],
    ]
    assert len(task.notes()) == 3


def test_a_held_out_file_may_not_ask_what_is_trained_on(sums, tmp_path):
    other = write(tmp_path / "held.jsonl", [{"prompt": "1+1=", "answer": 2}, SUMS[4], SUMS[6]])
    with pytest.raises(ValueError) as caught:
        made(str(sums), held_out=str(other)).prepare()
    assert str(caught.value) == (
        f"task_args.held_out={other}: 2 of its 3 questions are trained on too, the first in "
        "held.jsonl, line 2 and in sums.jsonl, line 5; take them out of one, or set "
        "task_args.allow_overlap=true, which leaves them in both"
    )
    task = made(str(sums), held_out=str(other), allow_overlap=True)
    assert len(data_set(task)) == 100 and len(draw_held_out(task, 3)) == 3


def test_a_mixture_draws_by_weight_and_each_set_in_its_epochs(tmp_path):
    few = write(tmp_path / "few.jsonl", [{"prompt": f"few{i}", "answer": "1"} for i in range(40)])
    many = write(
        tmp_path / "many.jsonl", [{"prompt": f"many{i}", "answer": "1"} for i in range(900)]
    )
    task = made({str(few): 1, str(many): 3}, held_out_rows=20)
    drawn = [text for step in range(10) for text in texts(draw_prompts(task, Draw(step, 100)))]
    counts = Counter(text.rstrip("0123456789") for text in drawn)
    assert counts == {"few": 250, "many": 750}
    left = Counter(text.rstrip("0123456789") for text in texts(data_set(task)))
    per_row = Counter(Counter(text for text in drawn if text.startswith("few")).values())
    assert set(per_row) <= {250 // left["few"], 250 // left["few"] + 1}
    joined = made([str(few), str(many)], held_out_rows=20)
    assert sorted(texts(data_set(joined))) == sorted(texts(data_set(task)))


def test_columns_make_the_prompt(tmp_path):
    rows = [{"q": "1+1", "a": 2, "why": "one and one", "level": 3, "sys": "Add."}] * 2
    rows[1] = {**rows[1], "q": "2+2"}
    path = str(write(tmp_path / "a.jsonl", rows))
    task = made(path, template="Q: {q} (level {level})\nA:", answer="a", solution_column="why",
                info=["level"], held_out_rows=1)  # fmt: skip
    (prompt,) = data_set(task)
    assert prompt.text in ("Q: 1+1 (level 3)\nA:", "Q: 2+2 (level 3)\nA:")
    assert (prompt.answer, prompt.info, task.solution(prompt)) == ("2", {"level": 3}, "one and one")
    (prompt,) = data_set(made(path, prompt="q", answer="a", system="sys", held_out_rows=1))
    assert prompt.text == "" and [m["role"] for m in prompt.messages] == ["system", "user"]
    assert task.score(prompt, Response(" 2 ")).reward == 1.0


def test_messages_are_the_prompt_and_the_last_assistants_the_solution(tmp_path):
    rows = [{"messages": CHAT}, {"messages": [{"role": "user", "content": "2+2"}], "answer": "4"}]
    path = write(tmp_path / "a.jsonl", [{**rows[0], "answer": "2"}, rows[1]])
    prompts = data_set(made(str(path), held_out_rows=1)) + draw_held_out(
        made(str(path), held_out_rows=1), 1
    )
    by_answer = {prompt.answer: prompt for prompt in prompts}
    assert list(by_answer["2"].messages) == CHAT[:2] and by_answer["2"].teaches == "2"
    assert list(by_answer["4"].messages) == rows[1]["messages"] and by_answer["4"].teaches == "4"
    users = [{"role": "user", "content": f"{i}"} for i in range(4)]
    only = write(tmp_path / "b.jsonl", [{"messages": [user, CHAT[2]]} for user in users])
    assert {prompt.answer for prompt in data_set(made(str(only)))} == {"2"}


def test_parquet_a_saved_directory_and_split_files_give_the_same_rows(sums, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table = datasets.Dataset.from_list(SUMS)
    table.to_parquet(tmp_path / "sums.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=table, test=table.select(range(5))).save_to_disk(tmp_path / "splits")
    files = tmp_path / "files"
    (files / "data").mkdir(parents=True)
    write(files / "data" / "train-00000-of-00002.jsonl", SUMS[:30])
    write(files / "data" / "train-00001-of-00002.jsonl", SUMS[30:])
    write(files / "data" / "test.jsonl", [{"prompt": "1+1=", "answer": 2}])
    (tmp_path / "list.json").write_text(json.dumps(SUMS, indent=1))
    expected = data_set(made(str(sums)))
    for name in ("sums.parquet", "saved", "splits", "files", "list.json"):
        found = data_set(made(str(tmp_path / name)))
        assert [(p.text, p.answer) for p in found] == [(p.text, p.answer) for p in expected], name
    with pytest.raises(ValueError, match="5 of its 5 questions are trained on too"):
        made(str(tmp_path / "splits"), held_out="test").prepare()
    assert texts(draw_held_out(made(str(files), held_out="test"), 1)) == ["1+1="]
    with pytest.raises(ValueError, match="splits has no split dev; it has train, test"):
        made(str(tmp_path / "splits"), split="dev").prepare()
    with pytest.raises(ValueError, match="files has no files of split dev; it has test, train"):
        made(str(files), split="dev").prepare()


def test_limit_takes_the_first_rows(sums):
    assert set(texts(data_set(made(str(sums), limit=10)))) < {row["prompt"] for row in SUMS[:10]}


ROW = '{"prompt": "a", "answer": 1}\n'
NO_TEXT = "not a text or a number; correct or remove it"
BAD = [
    ("", {}, "is empty; name a file with rows"),
    ("\n\n", {}, "has no row; name one that has"),
    (ROW + '\n{"prompt": "b"\n', {}, "a.jsonl, line 3: it is no JSON (Expect"),
    ("[1, 2]\n{}\n", {}, "a.jsonl, line 1: it is a list, not an object; a row is one JSON object"),
    (ROW, {"prompt": "promt"}, "task_args.prompt=promt: there is no such column; did you mean "
                               "prompt? the columns are prompt, answer"),
    ('{"question": "a", "answer": 1}\n', {"template": "{questions}"},
     "{questions} in task_args.template: there is no such column; did you mean question? the"),
    ('{"question": "a", "answer": 1}\n', {},
     "task_args.prompt is not set, and there is no column prompt or messages; name the column"),
    ('{"prompt": "a", "target": 1}\n', {}, "task_args.answer is not set, and there is no column"),
    (ROW, {"info": ["level"]}, "task_args.info=level: there is no such column"),
    (ROW, {"messages": "prompt", "prompt": "prompt"},
     "task_args.prompt and task_args.messages are given"),
    (ROW + '\n{"prompt": 5, "answer": 1}\n', {},
     "a.jsonl, line 3, column prompt: it is a number, not a text; correct or remove it"),
    ('{"prompt": [{"role": "user", "content": "a"}], "answer": 1}\n', {},
     "column prompt: it is a list, not a text; a chat is named by task_args.messages=prompt"),
    ('{"prompt": "a", "answer": [1]}\n', {}, f"line 1, column answer: it is a list, {NO_TEXT}"),
    ('{"prompt": "a", "answer": true}\n', {}, f"column answer: it is true or false, {NO_TEXT}"),
    ('{"prompt": "a", "answer": null}\n', {}, "line 1, column answer: it is null"),
    (ROW + '{"prompt": "b"}\n', {}, "line 2, column answer: it is missing"),
    ('{"prompt": " ", "answer": "1"}\n', {}, "column prompt: it is empty"),
    ('{"prompt": "\\ud800", "answer": "1"}\n', {}, "half a character"),
    ('{"messages": "a", "answer": "1"}\n', {}, "column messages: it is a text, not a list of mess"),
    ('{"messages": [{"role": "user"}], "answer": "1"}\n', {}, "content of message 0 is null"),
    ('{"messages": ["a"], "answer": "1"}\n', {}, "message 0 is no object with role and content"),
    ('{"messages": [{"role": "user", "content": "a"}]}\n', {}, "its last message is not an assist"),
    ('{"prompt": "a", "answer": "Paris"}\n' * 5, {"judge": "number"},
     "judge=number cannot read 5 rows: a.jsonl, line 1, column answer: 'Paris': it has no number; "
     "a.jsonl, line 2, column answer: 'Paris': it has no number; a.jsonl, line 3, column answer: "
     "'Paris': it has no number (and 2 more); correct it, or name another judge"),
    (ROW, {}, "the number of different questions is 1, and none is left"),
]  # fmt: skip


@pytest.mark.parametrize("content, args, message", BAD, ids=[message[-40:] for *_, message in BAD])
def test_data_that_cannot_be_used_is_refused_with_its_place(tmp_path, content, args, message):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        made(str(path), **args).prepare()
    assert str(path) in str(caught.value) or "task_args.held_out_rows" in str(caught.value)


@pytest.mark.parametrize(
    "args, message",
    [
        ({"path": "no.jsonl"}, "task_args.path=no.jsonl: no.jsonl is no file and no directory"),
        ({"held_out": "test"}, "sums.jsonl, which is a file, has no splits; name a file, or"),
        ({"split": "test"}, "task_args.split=test: "),
        ({"held_out": "t.jsonl"}, "task_args.held_out=t.jsonl: t.jsonl is no file"),
        ({"path": __file__}, "what is read are JSON Lines, JSON and Parquet files (.jsonl"),
        ({"held_out_rows": 100}, "held_out_rows=100: the number of different questions is 100"),
    ],
)
def test_paths_and_parts_that_are_not_there(sums, args, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_task("dataset", 0, {"path": str(sums), **args}).prepare()


def test_a_broken_parquet_file_names_itself(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=re.escape(f"{path} cannot be read by datasets (")):
        made(str(path)).prepare()


@pytest.mark.parametrize(
    "args, message",
    [
        ({"path": ""}, "task_args.path is empty"),
        ({"path": "a", "template": "no field"}, "it names no {column}"),
        ({"path": "a", "template": "{a"}, "a brace that is meant is written twice, {{ or }}"),
        ({"path": "a", "template": "{a.b}"}, "write columns as {name} alone"),
        (
            {"path": "a", "template": "{a}\\nA:"},
            "\\n is no line end here; write it in double quotes",
        ),
        ({"path": "a", "limit": 0}, "task_args.limit=0: must be at least 1"),
        ({"path": "a", "held_out": "b", "held_out_rows": 2}, "held_out=b are held out; give one"),
        ({"path": {"a": 1.0, "b": 0.0}}, "the weight of b is 0; give one above 0"),
        ({"path": "a", "judge": "exactly"}, "no such judge; did you mean exact?"),
        ({"path": "a", "judge": "regex"}, "task_args.judge_args.pattern is missing"),
        ({"path": "a", "shufle": False}, "did you mean task_args.shuffle?"),
        ({}, "task_args.path is missing: task=dataset needs it"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_read(args, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_task("dataset", 0, args)


def test_words_of_a_command_line_become_settings(sums):
    task = load_task("dataset", 0, {
        "path": {Text(sums): Text("2"), Text("b"): Text("0.5")}, "limit": Text("5"),
        "judge": Text("regex"), "judge_args": {Text("pattern"): Text("12"),
                                               Text("ignore_case"): Text("yes")},
    })  # fmt: skip
    assert task.path == {str(sums): 2.0, "b": 0.5} and task.limit == 5
    assert task.score(Prompt(0, "", "12"), Response("0 12")).reward == 1.0


@pytest.mark.parametrize(
    "name, judge, apart",
    [("dataset", "exact", False), ("dataset", "math", True), ("dataset", "regex", True),
     ("dataset", "mine:judge", True), ("gsm8k", None, False), ("spell_backward", None, False)],
)  # fmt: skip
def test_judges_that_may_hang_score_in_processes_of_their_own(name, judge, apart):
    assert scored_apart(name, {} if judge is None else {"judge": Text(judge)}) is apart


def test_gsm8k_is_a_data_set_with_five_keys(tmp_path):
    rows = [{"question": f"{i} and 1?", "answer": f"{i}+1={i + 1}\n#### {i + 1}"} for i in range(9)]
    write(tmp_path / "train.jsonl", rows[:6])
    write(tmp_path / "test.jsonl", rows[6:])
    task = made(str(tmp_path), name="gsm8k")
    assert len(data_set(task)) == 6 and len(draw_held_out(task, 3)) == 3
    prompt = data_set(task)[2]
    assert prompt.text == "Question: 2 and 1?\nAnswer:"
    assert task.solution(prompt) == prompt.answer == "2+1=3\n#### 3"
    assert task.score(prompt, Response("so\n#### 3.")).reward == 1.0
    assert task.score(prompt, Response("3")).reward == 0.0


def test_a_scoring_process_reads_no_data_and_imports_nothing_heavy():
    code = (
        "import sys; from mesh.tasks import load_task; from mesh.types import Prompt;"
        "task = load_task('dataset', 0, {'path': '/nowhere.jsonl', 'judge': 'number'});"
        "assert task.score(Prompt(0, 'q', '5'), 'it is 5').reward == 1;"
        "heavy = {'torch', 'datasets', 'pyarrow', 'sympy'}; print(heavy & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_a_judge_of_ones_own_is_code_of_the_run(tmp_path, monkeypatch):
    """Ranks compare its module, and a resumed run does."""
    (tmp_path / "strict_judge.py").write_text("def judge(answer, response): return 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    task = load_task("dataset", 0, {"path": "a.jsonl", "judge": "strict_judge:judge"})
    assert list(user_code(task, None, [])) == ["the task's module strict_judge"]
    assert user_code(load_task("dataset", 0, {"path": "a.jsonl"}), None, []) == {}
