"""What of a step is kept, and the file of it: the choice, the rows, the thread, the bound.

The choice in whole runs and on several layouts: distributed/test_samples_runs.py. Costs 3 seconds.
"""

from __future__ import annotations

import gzip
import json
import random
import threading
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_step import CENTRED, GROUPS, STEP, rollout, wave_of

from mesh.config.sections import LogConf
from mesh.model.logprobs import TokenScores
from mesh.program.groups import Groups
from mesh.program.records import samples_of, scored
from mesh.rl.cutting import owner
from mesh.rl.samples import chosen_groups, fixed_prompts, place_of
from mesh.rl.step import StepSettings, advantages_of
from mesh.runs.lines import line_of
from mesh.runs.metrics import MetricsLogger
from mesh.runs.sample_rows import FIELDS, row_of, shortest
from mesh.runs.samples import SAMPLES, SampleFile, member_of, members, read_samples
from mesh.runs.thinning import Thinning
from mesh.tasks import numbered
from mesh.text.pieces import token_texts
from mesh.text.tokenizer import CHARACTERS, load_tokenizer
from mesh.types import Outline, Prompt, Turn, Wave, outline

QUIET = LogConf(tensorboard=False, progress=False)
HOSTILE = "\ud800 <script>\x00\u202e\u2028 \U0001f600\r\n" + "x" * 100_000


def outlines(*rewards: tuple[float, ...]) -> list[Outline]:
    return [
        outline(rollout(prompt_id, i, 2, reward))
        for prompt_id, group in enumerate(rewards)
        for i, reward in enumerate(group)
    ]


def test_the_best_group_the_worst_and_others_by_chance():
    found = outlines((0.5, 0.5), (1.0, 0.9), (0.4, 0.0), (0.0, 1.0), (0.6, 0.2))
    assert chosen_groups(found, 2, 4, 0, 3) == {1: "best", 2: "worst"}
    assert chosen_groups(found, 2, 5, 0, 3) == {1: "best", 2: "worst"}, "whole groups alone"
    assert chosen_groups(found, 2, 1, 0, 3) == {1: "best"}, "one group at least"
    assert chosen_groups(found, 2, 0, 0, 3) == {} == chosen_groups([], 2, 4, 0, 3)
    assert chosen_groups(found, 2, -1, 0, 3) == dict.fromkeys(range(5), "all")
    every = chosen_groups(found, 2, 99, 0, 3)
    assert every == {1: "best", 2: "worst", 0: "random", 3: "random", 4: "random"}
    third = {next(iter(chosen_groups(found, 2, 6, 0, n).keys() - {1, 2})) for n in range(30)}
    assert third == {0, 3, 4}, "chance is of the step"
    assert any(
        chosen_groups(found, 2, 6, 0, n) != chosen_groups(found, 2, 6, 1, n) for n in range(9)
    ), "and of the seed"


def test_of_equal_groups_it_is_not_the_first():
    equal = outlines(*[(1.0, 0.0)] * 9)
    pairs = [tuple(chosen_groups(equal, 2, 4, 0, step)) for step in range(60)]
    assert all(best != worst for best, worst in pairs)
    assert {best for best, _ in pairs} == {worst for _, worst in pairs} == set(range(9))
    assert chosen_groups(equal[:2], 2, 4, 0, 0) == {0: "best"}


def test_means_are_exact_where_sums_round():
    """0.1 + 0.2 + 0.3 is above 0.3 + 0.2 + 0.1 in floating point."""
    found = [
        chosen_groups(outlines((0.1, 0.2, 0.3), (0.3, 0.2, 0.1)), 3, 3, 0, n) for n in range(9)
    ]
    assert {next(iter(one)) for one in found} == {0, 1}


def test_held_out_prompts_are_the_same_few():
    few = fixed_prompts(100, 4, 32, 0)
    assert len(few) == 8 and few == fixed_prompts(100, 4, 32, 0) != fixed_prompts(100, 4, 32, 1)
    assert len(fixed_prompts(100, 64, 32, 0)) == 1 and fixed_prompts(100, 4, 0, 0) == set()
    assert fixed_prompts(5, 4, -1, 0) == set(range(5)) == fixed_prompts(5, 4, 999, 0)


def scored_wave(rank: int = 0, num_ranks: int = 1) -> Wave:
    return wave_of(GROUPS, rank, num_ranks)


def kept(keys: StepSettings, rank: int = 0, num_ranks: int = 1, **fields: Any) -> list[dict]:
    """Records of what a rank owns of GROUPS: prompts 4, 5 and 6, of which 5 was not trained on."""
    wave = scored_wave(rank, num_ranks)
    prompts = numbered([Prompt(i, f"{i}>", f"a{i}") for i in (4, 50, 6)], first_id=4)
    groups = replace(Groups(prompts, [], wave, wave), **fields)
    mine = [r for r in wave.rollouts if r.prompt_id != 5]
    lengths = [len(r.tokens) for r in mine]
    scores = TokenScores(torch.full((sum(lengths),), -1.25), torch.arange(sum(lengths)) / 8)
    return samples_of(keys, 7, groups, advantages_of(wave, CENTRED, 2), [scored(mine, scores)])


def test_records_have_the_numbers_of_their_own_tokens():
    records = kept(replace(STEP, log_samples=-1, log_tokens=True))
    by_key = {(one["prompt_id"], one["sample_id"]): one for one in records}
    assert list(by_key) == [r.key for r in GROUPS]
    assert by_key[6, 1] == {
        "split": "train", "set": "", "chosen": "all", "prompt_id": 6, "sample_id": 1,
        "prompt": "6>", "answer": "a6", "reward": 4.0, "finish_reason": "length", "length": 5,
        "prompt_tokens": [5] * 7, "tokens": [6] * 5, "logprobs": [-1.0] * 5, "advantage": 2.0,
        "logprob_diffs": [-0.25] * 5, "entropies": [1.0, 1.125, 1.25, 1.375, 1.5],
    }  # fmt: skip
    assert by_key[5, 0]["task_prompt_id"] == 50 and "entropies" not in by_key[5, 0]
    assert [by_key[4, i]["entropies"] for i in (0, 1)] == [[0.0, 0.125, 0.25], [0.375]]
    bare = kept(replace(STEP, log_samples=-1))
    assert not any("logprob_diffs" in one for one in bare)
    left = kept(replace(STEP, log_samples=-1), left_out={5: "equal"})
    assert [one.get("left_out") for one in left] == [None, None, "equal", "equal", None, None]


def test_ranks_keep_what_they_own_of_one_choice():
    keys = replace(STEP, log_samples=4, log_tokens=True)
    whole = kept(keys)
    shares = [kept(keys, rank, 2) for rank in range(2)]
    assert {one["prompt_id"]: one["chosen"] for one in whole} == {6: "best", 4: "worst"}
    assert all(owner(one["prompt_id"], 2) == rank for rank in (0, 1) for one in shares[rank])
    joined = [{k: v for k, v in x.items() if k != "entropies"} for share in shares for x in share]
    assert sorted(joined, key=lambda x: (x["prompt_id"], x["sample_id"])) == [
        {k: v for k, v in x.items() if k != "entropies"} for x in whole
    ]


def test_a_row_has_the_texts_of_its_tokens():
    tokenizer = load_tokenizer(CHARACTERS)
    ids = tokenizer.encode("cat>")
    record = {
        "prompt_id": 0, "sample_id": 0, "finish_reason": "stop", "prompt_tokens": ids,
        "tokens": [*tokenizer.encode("ta"), 1], "logprobs": [float(np.float32(-0.1))] * 3,
        "logprob_diffs": [0.0] * 3, "entropies": [0.123456, 1.0, 2.0],
    }  # fmt: skip
    row = row_of(tokenizer, True, record)
    assert row["prompt_text"] == "cat>" and row["response"] == "ta"
    assert row["token_texts"] == ["t", "a", "<eos>"] and row["entropies"] == [0.1235, 1.0, 2.0]
    assert row["logprobs"] == [-0.1] * 3
    assert row["reward"] is row["turns"] is row["token_advantages"] is None
    bare = row_of(tokenizer, False, record)
    assert list(bare) == list(row) == list(FIELDS)
    assert {name for name in FIELDS if bare[name] != row[name]} == {
        "prompt_tokens", "tokens", "token_texts", "logprobs", "logprob_diffs", "entropies",
    }  # fmt: skip
    turns = [[2, True], [1, False], [2, True]]
    said = record | {"tokens": tokenizer.encode("ab>cd"), "turns": turns, "finish_reason": "length"}
    row = row_of(tokenizer, True, said)
    assert row["response"] == "cd"
    assert [(t["text"], t["sampled"], t["num_tokens"]) for t in row["turns"]] == [
        ("ab", True, 2), (">", False, 1), ("cd", True, 2),
    ]  # fmt: skip
    assert Turn(*turns[0]) == Turn(2, True)


def test_the_shortest_decimals_have_the_bits_of_float32():
    torch.manual_seed(0)
    numbers = (torch.randn(2000) * torch.logspace(-30, 30, 2000)).tolist()
    found = shortest(numbers)
    assert np.array_equal(np.float32(found).view(np.int32), np.float32(numbers).view(np.int32))
    assert all(float(f"{x:.9g}") == x for x in found), "nine digits are always enough"
    assert shortest(np.float32([0.1, -0.7, 1e-5, 0.0]).tolist()) == [0.1, -0.7, 1e-5, 0.0]


class Bytes:
    """A tokenizer of bytes, as byte-level ones decode them."""

    def __call__(self, ids) -> str:
        return bytes(ids).decode(errors="replace")


def test_texts_of_tokens_that_split_characters():
    decode = Bytes()
    text = list("aé€😀b".encode())
    assert token_texts(decode, text) == ["a", "", "é", "", "", "€", "", "", "", "😀", "b"]
    assert token_texts(decode, [0xE2, 0x82]) == ["\ufffd", ""]
    assert token_texts(decode, []) == []
    broken = [0xE2] * 500 + list("€".encode()) + [0xF0, 0x9F, 0x41]
    found = token_texts(decode, broken)
    assert "".join(found) == decode(broken) and found[499:503] == ["\ufffd", "", "", "€"]
    for seed in range(200):
        rng = random.Random(seed)
        ids = [rng.choice([0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0x41]) for _ in range(40)]
        found = token_texts(decode, ids)
        assert "".join(found) == decode(ids) and len(found) == len(ids)


def test_texts_of_a_decoder_that_looks_at_the_whole():
    def decode(ids) -> str:  # the end is seen first
        return "".join(map(chr, reversed(ids)))

    ids = [ord(x) for x in "abcdefghijklmnopqrstuvwxyz"]
    assert "".join(token_texts(decode, ids)) == decode(ids)


def rows(path: Path) -> list[dict[str, Any]]:
    return read_samples(path)


def test_the_file_is_a_function_of_its_content(tmp_path):
    groups = [[{"prompt_id": p, "sample_id": i} for i in range(2)] for p in range(3)]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with MetricsLogger(tmp_path / name, QUIET, 0, 2) as metrics:
            metrics.log(0, {})
            for step in (1, 2):
                metrics.log(step, {}, [row for group in groups for row in group])
    a, b = ((tmp_path / name / SAMPLES).read_bytes() for name in "ab")
    assert a == b
    assert a[4:8] == bytes(4), "no time"
    expected = [{"step": step} | row for step in (1, 2) for group in groups for row in group]
    assert rows(tmp_path / "a") == expected
    assert len(list(members(tmp_path / "a" / SAMPLES))) == 6, "a member for each group"
    assert [json.loads(line) for line in gzip.decompress(a).splitlines()] == expected
    with MetricsLogger(tmp_path / "a", QUIET, 0, 3, first=2) as metrics:
        metrics.log(3, {}, groups[0])
    assert rows(tmp_path / "a") == expected + [{"step": 3} | row for row in groups[0]]


def test_a_mark_is_the_size_behind_what_came_before(tmp_path):
    go = threading.Event()

    def slow(row):
        go.wait(10)
        return row

    file = SampleFile(tmp_path / SAMPLES, slow, Thinning(1e6, 1))
    empty = file.mark()
    file.put(1, [{"prompt_id": 0}])
    first = file.mark()
    file.put(1, [{"prompt_id": 1}])
    assert empty.size(10) == 0
    with pytest.raises(TimeoutError, match="was not written within 0.01 s"):
        first.size(0.01)
    go.set()
    file.close()
    part = member_of([{"step": 1, "prompt_id": 0}])
    assert first.size() == len(part) and (tmp_path / SAMPLES).read_bytes().startswith(part)


def test_what_cannot_be_written_ends_the_run_at_the_next_call(tmp_path):
    def torn(row):
        raise KeyError("prompt")

    file = SampleFile(tmp_path / SAMPLES, torn, Thinning(1e6, 1))
    file.put(1, [{"prompt_id": 0}])
    with pytest.raises(RuntimeError, match="step 1 cannot be written .KeyError"):
        file.mark().size()
    with pytest.raises(RuntimeError, match="step 1 cannot be written"):
        file.put(2, [])
    with pytest.raises(RuntimeError, match="step 1 cannot be written"):
        file.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_named():
    file = SampleFile(Path("/dev/full"), dict, Thinning(1e6, 1))
    file.put(1, [{"prompt_id": 0}])
    with pytest.raises(RuntimeError, match="/dev/full: cannot be written .No space left"):
        file.close()


def test_a_torn_member_is_ignored_where_a_run_was_killed(tmp_path):
    whole = [member_of([{"step": i, "prompt_id": i}]) for i in range(3)]
    path = tmp_path / SAMPLES
    for cut in range(1, len(whole[2])):
        path.write_bytes(b"".join(whole)[:-cut])
        assert [row["step"] for row in read_samples(tmp_path, killed=True)] == [0, 1]
        with pytest.raises(ValueError, match="its last part is truncated; a killed run may"):
            read_samples(tmp_path)
    path.write_bytes(whole[0] + b"no member" + whole[1])
    with pytest.raises(ValueError, match="samples.jsonl.gz: is damaged"):
        read_samples(tmp_path, killed=True)
    path.write_bytes(member_of([{"step": 1, "turns": None, "reward": 0.0}]))
    assert read_samples(tmp_path) == [{"step": 1, "reward": 0.0}], "what is null is absent"
    path.unlink()
    with pytest.raises(ValueError, match="samples.jsonl.gz: No such file"):
        read_samples(tmp_path)
    (tmp_path / "samples.jsonl").write_text('{"step": 1, "prompt": "of an old run"}\n{"st')
    old = {"step": 1, "split": "train", "set": "", "prompt": "of an old run"}
    assert read_samples(tmp_path, killed=True) == [old]
    path.write_bytes(whole[2])
    (tmp_path / "samples.jsonl").write_text('{"step": 1}\n')
    assert [row["step"] for row in read_samples(tmp_path)] == [1, 2], "an old run, resumed"


def test_members_longer_than_a_read_come_back(tmp_path):
    long = [{"prompt_id": i, "x": random.Random(i).randbytes(70_000).hex()} for i in range(4)]
    (tmp_path / SAMPLES).write_bytes(b"".join(member_of([row]) for row in long))
    assert rows(tmp_path) == long


def test_hostile_text_comes_back_but_for_half_a_character(tmp_path):
    row = {"prompt_id": 0, "prompt": HOSTILE, "parts": {"x\udfff": float("nan")}}
    with MetricsLogger(tmp_path, QUIET, 0, 1) as metrics:
        metrics.log(1, {}, [row])
    text = HOSTILE.replace("\ud800", "\ufffd")
    assert rows(tmp_path) == [
        {"step": 1, "prompt_id": 0, "prompt": text, "parts": {"x\ufffd": None}}
    ]
    assert line_of({"a": "\ud83d\ude00"}) == '{"a": "😀"}', "a pair is a character"


def test_datasets_loads_the_file(tmp_path):
    """Rows of training and evaluation, with turns, messages and what not every row has."""
    datasets = pytest.importorskip("datasets")
    tokenizer = load_tokenizer(CHARACTERS)
    plain = {"split": "train", "set": "", "chosen": "best", "prompt_id": 0, "sample_id": 0}
    plain |= {"prompt": "a", "answer": "", "finish_reason": "length", "prompt_tokens": [5]}
    plain |= {"tokens": [6, 7], "logprobs": [-1.0, -2.0], "length": 2, "reward": 0.5}
    talk = plain | {"split": "eval", "turns": [[1, True], [1, False]], "correct": True}
    talk |= {"messages": [{"role": "user", "content": "\x00\ud800é"}], "parts": {"brief": 0.5}}
    trained = plain | {"entropies": [0.5, 0.25], "logprob_diffs": [0.0, 0.0], "advantage": 1.0}
    with MetricsLogger(tmp_path, QUIET, 0, 1, row_of=partial(row_of, tokenizer, True)) as metrics:
        metrics.log(0, {}, [plain, talk])
        metrics.log(1, {}, [trained])
    found = datasets.load_dataset(
        "json", data_files=str(tmp_path / SAMPLES), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert found["step"][:] == [0, 0, 1] and found["entropies"][2] == [0.5, 0.25]
    assert found[1]["messages"] == [{"role": "user", "content": "\x00\ufffdé"}]
    assert [turn["num_tokens"] for turn in found[1]["turns"]] == [1, 1]
    assert found[0]["token_texts"] == list(tokenizer.decode([6, 7]))


def test_what_comes_last_of_a_step_is_chance():
    """By the seed and the step, and in the order in which the groups were chosen."""
    rewards = outlines((0.5, 0.5), (0.0, 0.0), (0.6, 0.4), (1.0, 1.0), (0.4, 0.6))
    found = {}
    for seed, step in product(range(8), range(8)):
        why = chosen_groups(rewards, 2, 10, seed, step)
        records = [
            {"chosen": why[p], "set": "", "prompt_id": p, "sample_id": i}
            for p in range(5)
            for i in range(2)
        ]
        ordered = sorted(records, key=lambda record, at=(seed, step): place_of(record, *at))
        assert [(one["prompt_id"], one["sample_id"]) for one in ordered] == list(
            product(why, range(2))
        )
        assert list(why)[:2] == [3, 1]
        found[seed, step] = tuple(why)[2:]
    assert len({found[0, step] for step in range(8)}) > 2
    assert len({found[seed, 0] for seed in range(8)}) > 2
    all_kept = [one | {"chosen": "all"} for one in records]
    backward = list(reversed(all_kept))
    assert sorted(backward, key=lambda record: place_of(record, 0, 3)) == all_kept
