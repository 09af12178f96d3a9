"""What ranks derive by themselves and do not have alike: all of them find it, in the same words."""

from __future__ import annotations

import json

import pytest
from launching import launch

from mesh.tasks.prompts import PURE
from mesh.tasks.spell_backward import SpellBackward

RANKS = 3


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """By case, what the ranks found, once it is known to be the same on all of them."""
    file = tmp_path_factory.mktemp("agreement") / "found.json"
    launch("tests/programs/agreement_program.py", RANKS, str(file))
    content = json.loads(file.read_text())
    by_rank = content["found"]
    assert len(by_rank) == RANKS and all(one == by_rank[0] for one in by_rank)
    print(f"{content['milliseconds']} ms a step")
    return by_rank[0]


def test_ranks_that_agree_find_nothing(found):
    assert found["nothing"] == []
    assert len(found["pure prompts"]) == 8


def test_a_key_is_named_with_both_values(found):
    assert found["a key"] == [
        "rank 2 differs from rank 0 in the configuration: trainer.lr is 0.0006 on rank 0 and "
        "0.0005 on rank 2; start every rank with the same command and files"
    ]
    (line,) = found["a variable"]
    assert "NVIDIA_TF32_OVERRIDE is unset on rank 0 and 0 on rank 2" in line


def test_files_and_code_are_compared_by_content(found):
    (line,) = found["weights"]
    assert line.startswith("rank 2 differs from rank 0 in the model directory: ")
    assert "model.safetensors of the model is " in line and "digest" in line
    (line,) = found["own code"]
    assert line.startswith("rank 2 differs from rank 0 in the task or the loss: ")
    assert "the task's module own_task is " in line
    (line,) = found["import fails"]
    assert "the problem is none on rank 0 and cannot import x on rank 2" in line


def test_a_plan_is_compared_part_by_part(found):
    (line,) = found["a plan"]
    assert line.startswith("rank 2 differs from rank 0 in the plan: step is ")
    assert "pass_tokens=16384" in line and "pass_tokens=8192" in line.partition(" on rank 0 ")[2]


def test_several_ranks_are_named_and_long_texts_shown_where_they_differ(found):
    (line,) = found["several ranks"]
    assert line.startswith("ranks 1, 2 differ from rank 0 in the part: text is ...")
    assert f"...{'x' * 40}0{'x' * 100} on rank 0 and ...{'x' * 40}1{'x' * 100} on rank 1" in line


def test_a_prompt_that_differs_is_shown_from_both_ranks(found):
    text = SpellBackward(0).train_prompts(1, 8)[2].text
    assert found["answers by rank"] == (
        "ranks 1, 2 differ from rank 0 in the prompts of step 2: prompt 2 is "
        f"Prompt(prompt_id=2, text='{text}', answer='answer of 0') on rank 0 and "
        f"Prompt(prompt_id=2, text='{text}', answer='answer of 1') on rank 1; {PURE}"
    )
    assert len(found["impure later, before"]) == 8
    start = "ranks 1, 2 differ from rank 0 in the prompts of step 4: prompt 7 is Prompt(prompt_id=7"
    assert found["impure later"].startswith(start)
