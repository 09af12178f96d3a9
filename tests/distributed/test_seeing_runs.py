"""tools.bench.seeing as a command: real runs in turn, one of them watched, and a page."""

from __future__ import annotations

from pathlib import Path

from launching import REPOSITORY, launch


def rows_of(text: str) -> dict[str, list[str]]:
    """Cells of the rows of all tables, by the first one."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {first: rest for first, *rest in rows}


def test_each_way_has_a_row_and_writes_what_it_says(tmp_path: Path):
    words = ["pairs=1", "ranks=1", "steps=5", "num_prompts=16", "every=1", "page=10"]
    made = launch("tools/bench/seeing.py", 1, *words, f"output={tmp_path}", cwd=REPOSITORY)
    rows = rows_of(made.stdout)
    assert float(rows["`on`"][0]) > 0 and rows["`off`"][3] == "1.000 (1.000 to 1.000)"
    assert rows["samples.jsonl.gz"][1] == rows["timeline.jsonl"][1] == "0"
    for way in ("on", "off", "watch"):
        assert (tmp_path / f"{way}-0" / "timeline.jsonl").exists() == (way != "off")
    written = int(rows["timeline.jsonl"][0].replace(",", ""))
    assert written == round((tmp_path / "on-0" / "timeline.jsonl").stat().st_size / 5)
    table = made.stdout.splitlines()
    watcher = table[table.index("`tools/watch.py` beside a run") + 4]
    assert int(watcher.strip("| ").split(" | ")[0]) > 0, made.stdout
    page = (tmp_path / "page-40" / "report.html").stat().st_size
    assert rows["40"][1] == f"{page / 1e6:.2f}"
