"""A report page read without a browser: it stands alone, and holds what the run wrote."""

from __future__ import annotations

import json
import math
import re

import pytest
from hostile_runs import rows_of
from page_reading import Page
from report_runs import make_run
from shown_runs import NAMES

MARKUP = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function",
          "createContextualFragment", "DOMParser", "srcdoc")  # fmt: skip


@pytest.fixture(scope="module")
def page(report, made):
    """page(name): the parsed page of a real run."""
    return lambda name: Page(report(made[name].path))


@pytest.mark.parametrize("name", NAMES)
def test_html_is_whole_and_stands_alone(page, name):
    found = page(name)
    assert found.open == [], "every element is closed"
    tags = {tag for tag, _ in found.elements}
    assert {"html", "head", "meta", "title", "style", "body", "main", "script"} <= tags
    assert not tags & {"link", "img", "iframe", "object", "embed", "base", "form", "video", "audio"}
    addresses = [
        value
        for _, attributes in found.elements
        for key, value in attributes.items()
        if key in ("src", "href", "action", "srcset", "data", "poster")
    ]
    assert all((address or "").startswith("#") for address in addresses)
    (policy,) = [a["content"] for _, a in found.elements if "http-equiv" in a]
    assert policy and policy.startswith("default-src 'none'; ") and "connect-src 'none'" in policy


def test_styles_and_scripts_fetch_nothing_and_make_no_markup_of_texts(page):
    """What comes from a run can become markup in no way but these."""
    for tag, attributes, text in page("tiny").texts:
        if attributes.get("id") == "data":
            continue
        assert not re.findall(r"@import|url\((?!#)", text), tag
        assert re.sub(r"http://www\.w3\.org/2000/svg", "", text).count("http") == 0
        assert [word for word in MARKUP if word in text] == []


@pytest.mark.parametrize("name", NAMES)
def test_embedded_curves_are_the_numbers_of_the_metrics(page, made, name):
    """Runs this short are not thinned; six digits."""
    (run,) = page(name).data["runs"]
    held = {
        series["key"]: dict(zip(series["steps"], series["values"], strict=True))
        for curve in [*run["curves"], *run["speed"]["curves"]]
        for series in curve["series"]
    }
    wanted: dict[str, dict[int, float]] = {}
    for line in made[name].metrics:
        for key, value in line.items():
            if key != "step" and isinstance(value, int | float) and math.isfinite(value):
                wanted.setdefault(key, {})[line["step"]] = value
    for key, by_step in wanted.items():
        if not key.startswith("seconds/") or key == "seconds/sync":
            assert held[key].keys() == by_step.keys(), key
            assert held[key] == pytest.approx(by_step, rel=1e-5, abs=1e-12), key
    assert held.keys() <= wanted.keys()
    phases = run["speed"]["phases"]
    for key in wanted:
        if key.startswith("seconds/"):
            column = dict(zip(phases["steps"], phases["seconds"][key[8:]], strict=True))
            for step, seconds in wanted[key].items():
                assert column[step] == pytest.approx(seconds, rel=1e-3), key


def test_embedded_rollouts_are_those_of_the_samples(page, made):
    for name in ("tiny", "calculator"):
        samples = page(name).data["runs"][0]["samples"]
        wanted = {(s["step"], s["split"], s["prompt_id"], s["sample_id"]): s
                  for s in rows_of(made[name].path)}  # fmt: skip
        assert samples["kept"] == samples["total"] == len(samples["rows"]) == len(wanted) > 100
        for row in samples["rows"]:
            sample = wanted[row["step"], row["split"], row["prompt_id"], row["sample_id"]]
            for key in ("prompt", "response", "reward", "finish_reason", "chosen", "token_texts"):
                assert row[key] == sample[key], key
            assert row["logprobs"] == pytest.approx(sample["logprobs"], rel=1e-2, abs=1e-6)


def test_findings_name_what_happened_to_a_run(page):
    """A run that collapsed and one that diverged; a short healthy one has no problem."""
    titles = {}
    for name in ("tiny", "collapsed", "diverged"):
        (run,) = page(name).data["runs"]
        assert all(f["text"] and (f["try"] or f["severity"] == "info") for f in run["findings"])
        titles[name] = [f["title"].lower() for f in run["findings"] if f["severity"] != "info"]
    assert any("entropy" in title for title in titles["collapsed"]), titles
    assert any("truncat" in title for title in titles["diverged"]), titles
    assert titles["tiny"] == []


def test_curves_of_thousands_of_steps_are_thinned_to_their_shape(report, tmp_path):
    """Extremes, first and last points stay."""
    run = make_run(tmp_path / "long", steps=3000, metrics=5, prompts=0, tokens=2)
    path = report(run)
    (held,) = Page(path).data["runs"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for curve in held["curves"]:
        for series in curve["series"]:
            all_of_it = {
                line["step"]: line[series["key"]] for line in lines if series["key"] in line
            }
            kept = dict(zip(series["steps"], series["values"], strict=True))
            assert kept == pytest.approx({step: all_of_it[step] for step in kept}, rel=1e-5)
            assert {min(all_of_it), max(all_of_it)} <= kept.keys()
            assert len(kept) < len(all_of_it) or len(all_of_it) < 1000
            for extreme in (min, max):
                wanted = extreme(all_of_it.values())
                assert extreme(kept.values()) == pytest.approx(wanted, rel=1e-5)
