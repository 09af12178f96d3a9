"""The picture of a run: values where they belong, where it comes from, light and dark."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tools.report.main import main
from tools.report.picture import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, picture

REPOSITORY = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"
METRICS = [
    {"step": 0, "eval/accuracy": 0.0, "eval/accuracy_greedy": 1.0},
    {"step": 1, "reward/mean": 0.5, "eval/accuracy": None},
    {"step": 2, "reward/mean": None, "eval/accuracy": 1.0, "digest/weights": "abc123"},
]


def lines(root: ElementTree.Element) -> dict[str, list[tuple[float, ...]]]:
    """The pixels of every line by its CSS class."""
    return {
        line.get("class", "").removeprefix("line "): [
            tuple(map(float, pixel.split(","))) for pixel in line.get("points", "").split()
        ]
        for line in root.iter(f"{SVG}polyline")
    }


def test_values_are_drawn_at_their_step_and_a_null_is_left_out():
    drawn = lines(ElementTree.fromstring(picture(METRICS, "a run")))
    assert drawn["sampled"] == [(LEFT, HEIGHT - BOTTOM), (WIDTH - RIGHT, TOP)]
    assert drawn["greedy"] == [(LEFT, TOP)]
    middle = ((LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2)
    assert drawn["reward"] == [pytest.approx(middle)]


def test_the_first_part_of_the_held_out_scores_is_a_line_with_its_name():
    metrics = [
        {"step": 0, "eval/reward/used": 0.0, "eval/reward/late": 1.0},
        {"step": 1, "eval/reward/used": 0.5},
    ]
    text = picture(metrics, "a run")
    assert lines(ElementTree.fromstring(text))["part"] == [
        (LEFT, HEIGHT - BOTTOM),
        (WIDTH - RIGHT, (TOP + HEIGHT - BOTTOM) / 2),
    ]
    assert ">held-out used<" in text and "late" not in text
    assert "part" not in lines(ElementTree.fromstring(picture(METRICS, "a run")))


def test_the_command_says_where_the_curve_comes_from(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    run.joinpath("metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in METRICS))
    environment = {"command": "python grpo.py conf=a<b", "world_size": 2, "git": "053035a"}
    run.joinpath("environment.json").write_text(json.dumps(environment))
    assert main([str(run), f"picture={tmp_path}/curve.svg"]) == 0
    described = ElementTree.fromstring((tmp_path / "curve.svg").read_text()).find(f"{SVG}desc")
    assert described is not None
    assert described.text == "conf=a<b, 2 ranks, commit 053035a; 2 steps, digest/weights abc123"


@pytest.mark.parametrize("metrics", ["", '{"step": 0}\n'])
def test_a_run_without_a_step_is_refused(tmp_path, capsys, metrics):
    tmp_path.joinpath("metrics.jsonl").write_text(metrics)
    environment = {"command": "", "world_size": 1, "git": None}
    tmp_path.joinpath("environment.json").write_text(json.dumps(environment))
    assert main([str(tmp_path), f"picture={tmp_path}/curve.svg"]) == 2
    assert "holds no step" in capsys.readouterr().err
    assert not (tmp_path / "curve.svg").exists()


@pytest.mark.parametrize(("name", "steps"), [("learning_curve", 150), ("calculator_curve", 40)])
def test_the_readmes_curves_learn_and_are_legible_on_dark_pages(name, steps):
    text = (REPOSITORY / "docs" / f"{name}.svg").read_text()
    drawn = lines(ElementTree.fromstring(text))
    assert len(drawn["reward"]) == steps
    first, last = drawn["sampled"][0][1], drawn["sampled"][-1][1]
    height = HEIGHT - TOP - BOTTOM
    assert (HEIGHT - BOTTOM - first) / height < 0.35 and (HEIGHT - BOTTOM - last) / height > 0.85
    assert "prefers-color-scheme: dark" in text
