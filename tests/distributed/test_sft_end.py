"""The end that recipes/sft.py teaches is where generation stops by itself."""

from __future__ import annotations

import json
from pathlib import Path

from chat_tokenizer import CHATML, END_OF_TEXT, IM_END, saved
from launching import launch

from mesh.runs.samples import read_samples

WORDS = ["task_args.min_length=1", "task_args.max_length=1", "eval.num_prompts=2"]


def test_a_model_of_sft_stops_at_the_end_of_a_turn(tmp_path: Path):
    """About 15 s. The template's end is not what generation_config.json names, and has not the
    lowest id."""
    tokenizer, model = saved(tmp_path / "tokenizer", CHATML, eos=[END_OF_TEXT]), tmp_path / "model"
    words = ["conf=qwen3_tiny", *WORDS, "sft.steps=30", "sft.batch_size=32"]
    words += [
        f"model.tokenizer={tokenizer}",
        f"sft.output={model}",
        "model.path=null",
        "model.init=random",
    ]
    made = launch("recipes/sft.py", 1, *words, f"run_dir={tmp_path / 'sft'}")
    assert f"an answer ends with '<|im_end|>' (id {IM_END})" in made.stdout
    config = json.loads((model / "config.json").read_text())
    assert config["eos_token_id"] == [IM_END, END_OF_TEXT, 1]
    words = ["conf=qwen3_tiny", *WORDS, f"model.path={model}", "steps=1", "trainer.lr=1e-9"]
    words += [f"run_dir={tmp_path / 'run'}", "log.samples=-1"]
    launch("recipes/grpo.py", 1, *words)
    rows = [row for row in read_samples(tmp_path / "run") if row["split"] == "train"]
    reasons = [row["finish_reason"] for row in rows]
    assert len(reasons) == 512 and reasons.count("stop") > 460
    logged = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    # an answer is one letter and the end of the turn
    assert logged["response_length/mean"] < 2.5
