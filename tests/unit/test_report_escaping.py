"""One file: data that cannot become markup, and nothing that is fetched."""

from __future__ import annotations

import json
import re

import pytest
from report_runs import make_run

from tools.report.build import report_data
from tools.report.html import PARTS, embedded, page

HOSTILE = (
    "</script><!--<script>alert(1)</script> & \u2028 \u2029 \ud800 \udfff \u202e \x00 \x85 é 😀"
)


def data_of(text):
    """The embedded data of a page, as a browser finds it: up to the first end tag."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script', text, re.S)
    assert found is not None
    return json.loads(found[1])


def test_embedded_json_has_no_character_that_ends_a_script():
    text = embedded({"a": HOSTILE, HOSTILE: [HOSTILE]})
    assert not set("<>&\u2028\u2029\ud800\udfff\x00") & set(text)
    assert json.loads(text) == {"a": HOSTILE, HOSTILE: [HOSTILE]}
    text.encode()  # no lone surrogate is left
    with pytest.raises(ValueError):
        embedded({"a": float("nan")})


def test_a_hostile_run_stands_in_the_page_as_data(tmp_path):
    run_dir = make_run(tmp_path / "run", steps=2, tokens=3, prompts=1)
    row = {"step": 2, "split": "train", "set": HOSTILE, "chosen": "best", "prompt_id": 9,
           "prompt": HOSTILE, "response": HOSTILE * 3000, "reward": 1.0}  # fmt: skip
    metrics = {"step": 3, f"reward/{HOSTILE}": 1.0, "{{data}}": 2.0}
    (run_dir / "samples.jsonl.gz").unlink()
    (run_dir / "samples.jsonl").write_text(json.dumps(row) + "\n")
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write(json.dumps(metrics) + "\n")
    (run_dir / "environment.json").write_text(json.dumps({"command": HOSTILE, "cpu": "{{styles}}"}))
    data = report_data([run_dir])
    data["runs"][0]["headline"]["title"] = f"{{{{scripts}}}} {HOSTILE}"
    text = page(data)
    assert data_of(text) == json.loads(json.dumps(data))
    text.encode()
    shown = data_of(text)["runs"][0]
    (found,) = shown["samples"]["rows"]
    assert found["prompt"] == HOSTILE and found["set"] == HOSTILE
    assert found["response"].startswith(HOSTILE) and found["cut"] > 0
    keys = {series["key"] for curve in shown["curves"] for series in curve["series"]}
    assert {f"reward/{HOSTILE}", "{{data}}"} <= keys
    assert re.search(r"<title>(.*?)</title>", text, re.S)[1].startswith("{{scripts}} &lt;/script")


def test_a_page_is_a_function_of_the_run_but_for_when_it_was_made(tmp_path):
    run_dir = make_run(tmp_path / "run", steps=5, tokens=4, prompts=2)
    texts = []
    for _ in range(2):
        data = report_data([run_dir])
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", data["made"])
        texts.append(page(data | {"made": "2026-01-01 00:00"}))
    assert texts[0] == texts[1]


def test_every_part_of_the_page_is_in_it(tmp_path):
    text = page(report_data([make_run(tmp_path / "run", steps=1, prompts=0)]))
    parts = [*PARTS.glob("*.css"), *PARTS.glob("*.js")]
    assert len(parts) >= 2
    for path in parts:
        content = path.read_text()
        assert content in text, path.name
        assert not re.search(r"</(script|style)", content), path.name
    assert "{{" not in text.replace(content, "").partition("<body>")[0]
