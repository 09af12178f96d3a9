"""Synthetic run directories for the report: made in a moment, of any size, in the files' formats.

    python tests/report_runs.py DIR [steps=150] [tokens=40] [prompts=4] [metrics=0]

They have what a run writes, with values of known shapes, and no model. Real runs are in the tests
that launch recipes.
"""

from __future__ import annotations

import gzip
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

from mesh.config.loading import merge, read_words, save_conf

Line = dict[str, Any]
SPLIT = (("trainer", 0), ("generator", 1))
ENVIRONMENT = {
    "format": 1,
    "started": "2026-11-27T05:00:00+0000",
    "command": "python recipes/grpo.py conf=qwen3_tiny",
    "git": "0123456789abcdef",
    "python": "3.11.7",
    "platform": "Linux",
    "packages": {"torch": "2.13.0"},
    "cuda": None,
    "cpu": "a CPU",
    "cpu_cores": 2,
    "variables": {"OMP_NUM_THREADS": "1"},
    "world_size": 2,
    "ranks": [{"rank": rank, "host": "machine-a", "device": "a CPU"} for rank in range(2)],
}


def make_run(
    path: Path,
    steps: int = 150,
    tokens: int = 40,
    prompts: int = 4,
    metrics: int = 0,
    words: tuple[str, ...] = (),
    group: int = 8,
) -> Path:
    """A run directory that a healthy run could have left: `metrics` more metrics than usual,
    `prompts` groups of samples each step, responses of about `tokens` tokens."""
    path.mkdir(parents=True, exist_ok=True)
    settings, problems = read_words(
        [f"steps={steps}", "model.path=package:qwen3_tiny", f"group_size={group}", *words]
    )
    conf, wrong = merge(settings)
    assert not problems + wrong, problems + wrong
    save_conf(conf, path / "config.yaml")
    (path / "environment.json").write_text(json.dumps(ENVIRONMENT, indent=2) + "\n")
    write_lines(path / "metrics.jsonl", [metrics_line(s, steps, metrics) for s in range(steps + 1)])
    write_lines(path / "timeline.jsonl", [timeline_line(step) for step in range(1, steps + 1)])
    with open(path / "samples.jsonl.gz", "wb") as file:
        for step in range(steps + 1):
            file.write(member([*samples(step, steps, tokens, prompts, group)]))
    (path / "model").mkdir(exist_ok=True)
    return path


def write_lines(path: Path, lines: list[Line]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def member(rows: list[Line]) -> bytes:
    """Rows as one gzip member, as a block of samples.jsonl.gz."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return gzip.compress(text.encode(errors="surrogatepass"), mtime=0) if rows else b""


def metrics_line(step: int, steps: int, more: int = 0) -> Line:
    """What a step of a run that learns logs; an evaluation every tenth."""
    done = step / max(steps, 1)
    noise = random.Random(step).uniform(-0.02, 0.02)
    line: Line = {"step": step}
    if step:
        line |= {
            "reward/mean": 0.2 + 0.7 * done + noise, "reward/std": 0.4, "reward/format": 0.9,
            "response_length/mean": 40 + noise, "response_length/max": 60.0,
            "response/truncated": 0.01, "truncated": 0.01,
            "entropy": 1.2 - 0.9 * done, "clip_fraction": 0.01, "ratio/max": 1.5,
            "ratio/mean": 1.0, "grad_norm": 1.0 + noise, "lr": 1e-6, "loss": noise * 1e-6,
            "logprob_diff/max": 3e-6, "logprob_diff/mean": 1e-7, "equal_groups": 0.2 + 0.3 * done,
            "tokens/generated": 2560.0, "tokens/trained": 2560.0, "steps_without_signal": 0.0,
            "seconds/generate": 0.3, "seconds/exchange": 0.01, "seconds/train": 0.4,
            "seconds/sync": 0.02, "tokens_per_second/generate": 8500.0,
            "tokens_per_second/train": 6400.0, "host_gb": 1.2, "sync/gb": 0.002,
            "sync/gb_per_second": 0.1, "digest/weights": f"{step:016x}",
        }  # fmt: skip
    if step % 10 == 0:
        line |= {
            "eval/accuracy": 0.2 + 0.7 * done, "eval/accuracy_greedy": 0.25 + 0.7 * done,
            "eval/pass@1": 0.2 + 0.7 * done, "eval/pass@4": 0.3 + 0.65 * done,
            "eval/reward": 0.2 + 0.7 * done, "eval/response_length/mean": 40.0,
            "seconds/eval": 0.5,
        }  # fmt: skip
    return line | {f"extra/{i}": math.sin(step / 20 + i) for i in range(more if step else 0)}


def timeline_line(step: int) -> Line:
    """A step of a split mesh: the generator works first, the trainer waits for it."""
    ranks = [
        {"rank": 0, "role": "trainer", "events": [
            ["generate", 0.0, 0.0, 0.0], ["exchange", 0.0, 0.31, 0.3], ["train", 0.31, 0.71, 0.0],
            ["sync", 0.71, 0.73, 0.0]]},
        {"rank": 1, "role": "generator", "events": [
            ["generate", 0.0, 0.3, 0.0], ["exchange", 0.3, 0.31, 0.0], ["train", 0.31, 0.31, 0.0],
            ["sync", 0.31, 0.73, 0.4]]},
    ]  # fmt: skip
    return {"step": step, "began": 1.7e9 + step, "ranks": ranks}


def samples(step: int, steps: int, tokens: int, prompts: int, group: int) -> list[Line]:
    """The rollouts that a step keeps, and those of an evaluation every tenth step."""
    rows = []
    kinds = ("best", "worst", *(["random"] * prompts))[:prompts]
    for prompt, chosen in enumerate(kinds if step else ()):
        rows += [row(step, "train", chosen, prompt, one, tokens) for one in range(group)]
    if step % 10 == 0:
        for prompt in range(4):
            rows += [row(step, "eval", "fixed", prompt, one, tokens) for one in (-1, 0, 1)]
    return rows


def row(step: int, split: str, chosen: str, prompt: int, sample: int, tokens: int) -> Line:
    """One rollout; the best group of a step is right, the worst wrong."""
    draw = random.Random(f"{step} {split} {prompt} {sample}")
    length = max(1, round(tokens * draw.uniform(0.8, 1.0)))
    texts = draw.choices(("word ", "a", "number ", "\n", "1", "2", "+"), k=length)
    reward = {"best": 1.0, "worst": 0.0}.get(chosen, float(draw.random() < 0.5))
    made: Line = {
        "step": step, "split": split, "set": "", "chosen": chosen, "prompt_id": prompt,
        "sample_id": sample, "prompt": f"What is {prompt} + {prompt}?",
        "prompt_text": f"<bos>What is {prompt} + {prompt}?", "response": "".join(texts),
        "answer": str(2 * prompt), "reward": reward, "correct": reward == 1.0,
        "finish_reason": "stop" if draw.random() < 0.9 else "length", "length": length,
        "prompt_tokens": [1, 2, 3], "tokens": [draw.randrange(5000) for _ in range(length)],
        "token_texts": texts, "logprobs": [-draw.random() for _ in range(length)],
    }  # fmt: skip
    if split == "train":
        made |= {
            "advantage": draw.uniform(-1, 1), "parts": {"format": 0.5},
            "logprob_diffs": [draw.uniform(-1e-6, 1e-6) for _ in range(length)],
            "entropies": [round(draw.random(), 4) for _ in range(length)],
        }  # fmt: skip
    return made


if __name__ == "__main__":
    options = dict(word.split("=") for word in sys.argv[2:])
    print(make_run(Path(sys.argv[1]), **{name: int(value) for name, value in options.items()}))
