"""`log.samples_mb`: what the file keeps where it would grow beyond it.

Costs 2 seconds.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mesh.config.sections import LogConf
from mesh.runs.metrics import MetricsLogger
from mesh.runs.samples import SAMPLES, read_samples
from mesh.runs.thinning import Thinning

Row = Mapping[str, Any]
GROUPS, SAMPLES_EACH, PROMPTS, EVERY = 4, 2, 5, 10
SETS = ("", "hard")


def group(split: str, name: str, step: int, prompt_id: int) -> list[dict[str, Any]]:
    """Rows of about 300 bytes each, compressed."""
    noise = random.Random(f"{split}/{name}/{step}/{prompt_id}")
    fields = {"split": split, "set": name, "prompt_id": prompt_id}
    return [fields | {"sample_id": i, "x": noise.randbytes(250).hex()} for i in range(SAMPLES_EACH)]


def rows_of(step: int) -> list[Row]:
    """A step of 2.4 kB, an evaluation of 6 kB every 10 steps."""
    groups = [group("train", "", step, i) for i in range(GROUPS if step else 0)]
    if step % EVERY == 0:
        groups += [group("eval", name, step, i) for name in SETS for i in range(PROMPTS)]
    return [row for one in groups for row in one]


def log(path: Path, steps: int, samples_mb: float, of: Sequence[int] | None = None) -> list[Row]:
    """What a run keeps that logs these steps, all without `of`, into its directory."""
    path.mkdir(exist_ok=True)
    conf = replace(LogConf(tensorboard=False, progress=False), samples_mb=samples_mb)
    of = range(steps + 1) if of is None else of
    with MetricsLogger(path, conf, 0, steps, first=max(of[0] - 1, 0)) as logger:
        for step in of:
            logger.log(step, {}, rows_of(step))
            assert logger._samples.mark().size() <= samples_mb * 1e6, "at every step"
    return read_samples(path)


def kept(rows: Sequence[Row], split: str, name: str = "") -> Counter[int]:
    """Groups by step."""
    found = Counter(row["step"] for row in rows if (row["split"], row["set"]) == (split, name))
    assert all(number % SAMPLES_EACH == 0 for number in found.values()), "whole groups"
    return Counter({step: number // SAMPLES_EACH for step, number in found.items()})


def phases(steps: Sequence[int], first: int, last: int, number: int = 8) -> list[int]:
    """How many of these steps are in each of so many equal parts of the run."""
    width = (last - first) / number
    found = Counter(min(int((step - first - 1) / width), number - 1) for step in steps if step)
    return [found[part] for part in range(number)]


def test_a_run_that_fits_keeps_everything(tmp_path):
    rows = log(tmp_path / "run", 100, 0.6)
    assert (tmp_path / "run" / SAMPLES).stat().st_size < 0.35e6
    assert rows == [{"step": step} | row for step in range(101) for row in rows_of(step)]


def test_a_long_run_has_something_of_every_phase(tmp_path, capsys):
    """Needs 1.2 MB, and has 0.3."""
    rows = log(tmp_path / "run", 400, 0.3)
    train = kept(rows, "train")
    assert set(train.values()) == {GROUPS}, "steps are kept whole"
    first, *later = phases(list(train), 0, 400)
    assert first >= min(later) > 0 and max(later) <= 2 * min(later), later
    assert set(range(1, 9)) <= set(train), "the first steps at once"
    for name in SETS:
        evaluations = kept(rows, "eval", name)
        assert set(evaluations) == set(range(0, 401, EVERY)), "every evaluation"
        ids = {row["prompt_id"] for row in rows if row["set"] == name and row["split"] == "eval"}
        assert {0} < ids, "the same prompts first, and others where there is room"
    always = [row for row in rows if row["split"] == "eval" and row["prompt_id"] == 0]
    assert len(always) == 41 * len(SETS) * SAMPLES_EACH
    size = (tmp_path / "run" / SAMPLES).stat().st_size
    assert 0.2e6 < size < 0.29e6, "used, and something left"
    warned = capsys.readouterr().out
    assert (
        warned.count("warning: samples.jsonl.gz grows faster than log.samples_mb=0.3 allows") == 1
    )


def test_a_run_that_is_resumed_with_more_steps_keeps_more_of_them(tmp_path):
    log(tmp_path / "run", 400, 0.3)
    before = (tmp_path / "run" / SAMPLES).read_bytes()
    rows = log(tmp_path / "run", 800, 0.3, range(401, 801))
    assert (tmp_path / "run" / SAMPLES).read_bytes().startswith(before)
    assert all(phases([step for step in kept(rows, "train") if step > 400], 400, 800, 4))
    for name in SETS:
        assert all(phases([s for s in kept(rows, "eval", name) if s > 400], 400, 800, 4))


@pytest.mark.parametrize("killed", [1, 9, 12, 30, 199, 399])
def test_a_run_that_was_killed_and_resumed_has_the_same_file(tmp_path, killed):
    log(tmp_path / "whole", 400, 0.3)
    log(tmp_path / "killed", 400, 0.3, range(killed + 1))
    log(tmp_path / "killed", 400, 0.3, range(killed + 1, 401))
    whole, resumed = ((tmp_path / name / SAMPLES).read_bytes() for name in ("whole", "killed"))
    assert whole == resumed


def test_a_bound_that_is_raised_or_lowered_holds_from_then_on(tmp_path):
    log(tmp_path / "run", 400, 0.3, range(201))
    size = (tmp_path / "run" / SAMPLES).stat().st_size
    few = log(tmp_path / "few", 400, 0.3, range(201))
    assert log(tmp_path / "few", 400, 0.3, range(201, 401)) != few
    after = log(tmp_path / "run", 400, 10, range(201, 401))
    assert {step for step in kept(after, "train") if step > 200} == set(range(201, 401))
    thinning = Thinning(size / 2, 400)
    assert thinning.choose(201, size, [(("train", ""), 1)]) == [False]


def test_of_a_large_step_the_first_groups_are_kept():
    """More than a twentieth of the bound, here 50 bytes; less is kept whole or not at all."""
    train = ("train", "")
    groups = [(train, 20)] * 30
    assert Thinning(1000, 100).choose(1, 0, groups) == [True] * 3 + [False] * 27, "75 bytes"
    assert Thinning(1000, 100).choose(1, 0, groups[:3]) == [True] * 3
    assert not any(Thinning(1000, 100).choose(1, 60, groups[:3])), "30 bytes are room for one"
    assert Thinning(1000, 100).choose(1, 60, [(train, 30)]) == [True]
    assert Thinning(1000, 10).choose(10, 0, [(train, 680)]) == [True], "saved up to the last step"
    assert Thinning(1000, 10).choose(10, 0, [(train, 682)]) == [False]


def test_sets_share_what_is_for_evaluations():
    """A quarter of a tenth of 1000 bytes, at the start; each of ten sets asks for half of that."""
    groups = [(("eval", str(number)), 5) for number in range(10) for _ in range(3)]
    assert not any(Thinning(1000, 100).choose(0, 0, groups)), "2.5 bytes each"
    assert Thinning(1000, 100).choose(0, 0, groups[:15]) == [True, False, False] * 5
    assert Thinning(1000, 100).choose(0, 0, groups[:3]) == [True] * 3
