"""Whole runs on data sets: resumed in the middle of an epoch with rows to skip, and refused."""

from __future__ import annotations

import json
from pathlib import Path

from launching import Run, launch, runs

WORDS = [
    "conf=qwen3_tiny", "num_prompts=8", "group_size=2", "eval.every=0", "eval.num_prompts=4",
    "eval.num_samples=1", "log.tensorboard=false", "log.samples=-1", "task=dataset",
]  # fmt: skip

LENGTHS = {"whole": 6, "half": 3}


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(names: list[str]) -> list[str]:
    """A row to spell backward, or one that is too long for the context."""
    return [name if len(name) < 9 else name * 9 for name in names]


def test_a_mixture_with_rows_to_skip_resumes_to_the_bit_on_another_layout(tmp_path):
    """In the second epoch of one set and the first of the other."""
    few = [f"{a}{b}" for a in "abcd" for b in "efg"] + ["toolongforit"]
    many = [f"{a}{b}{c}" for a in "hijk" for b in "lmno" for c in "pqrs"] + ["muchtoolong"] * 6
    files = [
        write(tmp_path / f"{name}.jsonl", [{"prompt": w + ">", "answer": w[::-1]} for w in rows])
        for name, rows in (("few", words(few)), ("many", words(many)))
    ]
    mixture = f"task_args.path={{{files[0]}: 1, {files[1]}: 1}}"
    keys = [*WORDS, mixture, "task_args.held_out_rows=6", "overlong=skip", "checkpoint.every=3"]
    asked = {name: ("grpo", [*keys, f"steps={steps}"]) for name, steps in LENGTHS.items()}
    made, half = runs(tmp_path, 2, asked).values()
    launch("recipes/grpo.py", 1, f"resume={half.path}", "steps=6")
    resumed = Run(half.path, "")
    drawn = [[line["digest/prompts"] for line in one.metrics[1:]] for one in (made, resumed)]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 6
    assert [s["prompt"] for s in made.samples] == [s["prompt"] for s in resumed.samples]
    assert sum(line["prompts/skipped"] for line in made.metrics[1:]) > 0
    skipped = [[line["prompts/skipped"] for line in one.metrics[1:]] for one in (made, resumed)]
    assert skipped[0] == skipped[1]
    assert "rows to train on, 6 questions held out" in made.output


def test_data_that_cannot_be_used_is_refused_before_a_model_is_built(tmp_path):
    rows = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "1+2=", "answer": "three"}]
    path = write(tmp_path / "sums.jsonl", rows)
    asked = [f"task_args.path={path}", "task_args.judge=number", f"run_dir={tmp_path / 'run'}"]
    result = launch("recipes/grpo.py", 2, *WORDS, *asked, "num_prompts=9", status=1)
    title, *found = result.stderr.splitlines()[:3]
    assert title == "2 problems with the configuration:"
    assert found[0] == (
        f"- task_args.path={path}: judge=number cannot read 1 row: sums.jsonl, line 2, column "
        "answer: 'three': it has no number; correct it, or name another judge (task_args.judge)"
    )
    assert found[1].startswith("- num_prompts=9: is not a multiple of 2")
    assert "model" not in result.stdout and not (tmp_path / "run").exists()
