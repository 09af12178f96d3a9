"""Validate losses x updates per step x truncated sampling, each by `recipes/validate.py`.

    python -m tools.validate_grid [losses=grpo,gspo,...] [updates=1,4] [truncated=no,yes] [ranks=2]
        [output=DIR] [key=value ...]

The model is the tiny one unless `conf=` or `model.path=` says otherwise; other arguments go to the
recipe, which sees a vocabulary cut by top-k 40 and top-p 0.9 where sampling is truncated. One rank
with `engine=vllm` compares the two engines (L6). A validation that `output` holds already is read,
not run again. The table, which DIR/grid.md holds too, has what each compared; exit status 1 where a
rung failed. `distill` needs a `teacher.path=`, and is in the grid where it is named.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from mesh.rl.losses import LOSSES
from tools import ROOT

SMALL = (
    "conf=qwen3_tiny", "num_prompts=8", "group_size=4", "model.max_length=64",
    "generator.max_new_tokens=8", "validate.sequences=33", "validate.steps=2",
    "log.tensorboard=false",
)  # fmt: skip
TRUNCATED = ("truncated_logprobs=true", "generator.top_k=40", "generator.top_p=0.9")
Point = tuple[str, int, bool]


def main(argv: list[str]) -> int:
    options, words = read_words(argv)
    output = Path(options["output"])
    output.mkdir(parents=True, exist_ok=True)
    grid: list[Point] = [
        (loss, int(updates), truncated == "yes")
        for loss, updates, truncated in product(
            *(options[name].split(",") for name in ("losses", "updates", "truncated"))
        )
    ]
    lines = ["| loss | updates | truncated | comparisons | rungs | result |", "| --- " * 6 + "|"]
    print("\n".join(lines), flush=True)
    failed = 0
    for point in grid:
        report = validated(point, int(options["ranks"]), words, output)
        failed += report is None or not report["passed"]
        lines.append(row(point, report))
        print(lines[-1], flush=True)
    (output / "grid.md").write_text("\n".join(lines) + "\n")
    return 1 if failed else 0


def read_words(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """Our own options, and the recipe's arguments."""
    options = {
        "losses": ",".join(name for name in LOSSES if name != "distill"), "updates": "1,4",
        "truncated": "no,yes", "ranks": "2", "output": "",
    }  # fmt: skip
    options |= dict(word.split("=", 1) for word in argv if word.partition("=")[0] in options)
    counts = [options["ranks"], *options["updates"].split(",")]
    if not all(count.isdecimal() and int(count) for count in counts) or not (
        set(options["truncated"].split(",")) <= {"no", "yes"}
    ):
        raise SystemExit(__doc__)
    options["output"] = options["output"] or tempfile.mkdtemp(prefix="validate-grid-")
    return options, [word for word in argv if word.partition("=")[0] not in options]


def validated(point: Point, ranks: int, words: list[str], output: Path) -> dict[str, Any] | None:
    """The report of a point of the grid; None: it ended without one."""
    loss, updates, truncated = point
    run_dir = output / f"{loss}-u{updates}{'-truncated' if truncated else ''}"
    report = run_dir / "validation.json"
    if not report.exists():
        keys = [f"loss={loss}", f"updates_per_step={updates}", *(TRUNCATED if truncated else ())]
        torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
        recipe = str(ROOT / "recipes" / "validate.py")
        command = [sys.executable, *torchrun, recipe, *SMALL, *keys, *words, f"run_dir={run_dir}"]
        shutil.rmtree(run_dir, ignore_errors=True)  # what an interrupted grid left
        with run_dir.with_suffix(".log").open("w") as log:
            subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=False)
    return json.loads(report.read_text()) if report.exists() else None


def row(point: Point, report: dict[str, Any] | None) -> str:
    """A line of the table."""
    loss, updates, truncated = point
    shown = f"| `{loss}` | {updates} | {'yes' if truncated else 'no'} |"
    if report is None:
        return f"{shown} | | ended without a report: see its log |"
    ran = [check for check in report["checks"] if check["not_run"] is None]
    total = sum(check["tally"]["compared"] for check in ran)
    rungs = ", ".join(dict.fromkeys(check["rung"] for check in ran))
    return f"{shown} {total:,} | {rungs} | {'equal' if report['passed'] else 'differs'} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
