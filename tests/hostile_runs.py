"""Run directories that a report page has to survive: with texts that attack it, and damaged ones.

Each is a copy of a real run that was changed in one way.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Line = dict[str, Any]
LONG = "A" + "x" * 99_998 + "Z"
TEXTS = {
    "script": "<script>alert('script')</script>",
    "end of the data": "</script><script>alert('end')</script><!--<script>",
    "image": "<img src=x onerror=\"alert('image')\">",
    "attribute": "\"' onmouseover=alert('attribute') autofocus onfocus=alert('focus') x=\"",
    "address": "javascript:alert('address')",
    "template": "{{data}} {{scripts}} ${alert('template')} \\u003cscript\\u003e",
    "right to left": "\u202eright to left\u202c \u05e9\u05dc\u05d5\u05dd \u2066isolated",
    "emoji": "\U0001f469\u200d\U0001f4bb \U0001f3f4\u200d\u2620\ufe0f \U0001f44d\U0001f3fd",
    "lone surrogates": "high \ud83d low \udc4d end",
    "controls": "null \x00 bell \x07 escape \x1b[31m line \u2028 paragraph \u2029 mark \ufeff end",
    "long": LONG,
    "lines": "first\r\n\r\n\tsecond\n" * 3,
}
NAME = TEXTS["image"].replace("/", "")
PROMPT = 9999
"""The prompt id of the group that attacks."""


def hostile_run(source: Path, target: Path) -> Path:
    """A run whose every text attacks: rollouts, configuration, names of metrics, environment. A
    group of step 1 has one of TEXTS in all fields of each of its rows."""
    run = target / NAME
    shutil.copytree(source, run)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        config + f"{json.dumps(NAME)}: {json.dumps(TEXTS['script'])}\n"
    )
    environment = json.loads((run / "environment.json").read_text())
    environment |= {"command": TEXTS["end of the data"], "packages": {NAME: TEXTS["attribute"]}}
    (run / "environment.json").write_text(json.dumps(environment))
    edit_lines(run / "metrics.jsonl", lambda line: line | {f"reward/{NAME}": 0.5, NAME: 1.0})
    (run / "profiles").mkdir(exist_ok=True)
    (run / "profiles" / "step-1-rank-0.txt").write_text("\n".join(map(written, TEXTS.values())))
    rows = rows_of(run)
    (first, *_) = [row for row in rows if row["step"] == 1]
    texts = enumerate(TEXTS.values())
    attacking = [attack(first | {"prompt_id": PROMPT, "sample_id": k}, t) for k, t in texts]
    write_rows(run, attacking + rows)
    return run


def attack(row: Line, text: str) -> Line:
    """A row whose texts are all `text`; its tokens are words, and parts of very long ones."""
    pieces = re.findall(r"\s*\S{1,50}|\s+$", text)
    assert "".join(pieces) == text
    numbers = {"logprobs": -0.7, "logprob_diffs": 1e-6, "entropies": 0.5}
    return row | {
        "prompt": text, "prompt_text": text, "response": text, "answer": text,
        "messages": [{"role": text[:200], "content": text}], "finish_reason": text[:200],
        "parts": {text[:200]: 0.5}, "token_texts": pieces, "tokens": [1] * len(pieces),
        "length": len(pieces),
    } | {key: [value] * len(pieces) for key, value in numbers.items()}  # fmt: skip


def written(text: str) -> str:
    """A text that a file can hold."""
    return text.encode("utf-8", "replace").decode()


def rows_of(run: Path) -> list[Line]:
    return [json.loads(line) for line in gzip.open(run / "samples.jsonl.gz", "rt")]


def write_rows(run: Path, rows: list[Line]) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "samples.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))


def edit_lines(path: Path, change: Callable[[Line], Any]) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(change(line)) + "\n" for line in lines))


FILES = ("metrics.jsonl", "samples.jsonl.gz", "timeline.jsonl", "config.yaml", "environment.json")
ODD = [None, True, [], {}, "text", -1, 1e308, "NaN", [[[]]], {"step": {}}]


def cut(name: str, bytes_left_out: int) -> Callable[[Path], None]:
    return lambda run: (run / name).write_bytes((run / name).read_bytes()[:-bytes_left_out])


def garbage(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).write_bytes(random.Random(name).randbytes(5000))


def garbage_inside(name: str) -> Callable[[Path], None]:
    """Bytes in the middle are overwritten."""

    def change(run: Path) -> None:
        content = bytearray((run / name).read_bytes())
        middle = len(content) // 2
        content[middle : middle + 40] = random.Random(name).randbytes(40)
        (run / name).write_bytes(content)

    return change


def without(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).unlink()


def emptied(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).write_bytes(b"")


def a_directory(name: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        (run / name).unlink()
        (run / name).mkdir()

    return change


def of_wrong_types(name: str) -> Callable[[Path], None]:
    """Every value of every line is in turn of another type."""

    def change(run: Path) -> None:
        lines = rows_of(run) if name.endswith(".gz") else None
        if lines is None:
            lines = [json.loads(line) for line in (run / name).read_text().splitlines()]
        draw = random.Random(name)
        changed = [line | {draw.choice([*line]): draw.choice(ODD)} for line in lines] + ODD
        if name.endswith(".gz"):
            write_rows(run, changed)
        else:
            (run / name).write_text("".join(json.dumps(line) + "\n" for line in changed))

    return change


def other_content(name: str, text: str) -> Callable[[Path], None]:
    return lambda run: (run / name).write_text(text)


def damages() -> Iterator[tuple[str, str, Callable[[Path], None]]]:
    """(what happened, the file that it happened to, what does it)."""
    for name in FILES:
        yield f"no {name}", name, without(name)
        yield f"an empty {name}", name, emptied(name)
        yield f"garbage for {name}", name, garbage(name)
        yield f"a directory {name}", name, a_directory(name)
    yield "half a line of metrics", "metrics.jsonl", cut("metrics.jsonl", 20)
    yield "half a line of the timeline", "timeline.jsonl", cut("timeline.jsonl", 20)
    yield "a truncated gzip", "samples.jsonl.gz", cut("samples.jsonl.gz", 50)
    yield "garbage inside a gzip", "samples.jsonl.gz", garbage_inside("samples.jsonl.gz")
    yield "garbage inside metrics", "metrics.jsonl", garbage_inside("metrics.jsonl")
    for name in ("metrics.jsonl", "timeline.jsonl", "samples.jsonl.gz"):
        yield f"wrong types in {name}", name, of_wrong_types(name)
    yield "a list as configuration", "config.yaml", other_content("config.yaml", "[1, 2]\n")
    yield "half a configuration", "config.yaml", other_content("config.yaml", "a: [1,\n")
    yield "a list as environment", "environment.json", other_content("environment.json", "[1]")
