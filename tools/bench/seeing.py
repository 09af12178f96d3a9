"""The cost of seeing a run: step times with and without what it writes for that, and watched.

    python -m tools.bench.seeing [pairs=3] [ways=on,off,watch] [ranks=1|2] [every=5]
        [page=1000] [tokens=40] [output=DIR] [key=value ...]

Runs of recipes/grpo.py take turns:

    on     with the samples, tokens and timeline that are written by default
    off    without them: log.samples=0 log.timeline=false
    watch  as `on`, beside `tools/watch.py` and a reader that asks for new data every so many
           seconds, as a browser does
    all    with all rollouts, log.samples=-1; if it is asked for

They are runs of `conf=qwen3_tiny`, 30 steps on 2 ranks; on a GPU of `conf=qwen3 model.init=random`,
10 steps on 1 rank; other arguments go to the recipe. A step's seconds are those between its line of
metrics.jsonl and the line before, by the clock and of CPU time of all ranks, which other work on
the machine lengthens less. The first two do not count, nor those with an evaluation. Then the bytes
that a run has written a step, by file.

`page`: steps of a synthetic run, with 32 rollouts a step of about `tokens` tokens (a list, as
40,4000), whose report is built; 0: none.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import torch

from tools import ROOT
from tools.bench.measured_run import MeasuredRun, children_cpu_seconds, run_recipe
from tools.bench.report import hardware, print_row, spread
from tools.bench.sizes import sized
from tools.bench.vocabulary import with_tokenizer
from tools.bench.watching import Watched, watching

DEFAULT = ("on", "off", "watch")
WAYS = {
    "on": [],
    "off": ["log.samples=0", "log.timeline=false"],
    "watch": [],
    "all": ["log.samples=-1"],
}
WARM_UP = 2  # steps that do not count
ONCE = ("model", "config.yaml", "environment.json", "lock")  # written at the start or the end


@dataclass(frozen=True)
class Seen:
    """A run of one way, and its watcher's account."""

    run: MeasuredRun
    watched: Watched | None

    @property
    def steps(self) -> list[int]:
        """Places of the lines whose steps count."""
        metrics = self.run.metrics
        found = [
            i for i in self.run.lines
            if metrics[i]["step"] > WARM_UP and "seconds/eval" not in metrics[i]
        ]  # fmt: skip
        if not found:
            raise SystemExit(f"{self.run.run_dir}: no step counts; set steps={WARM_UP + 3} or more")
        return found

    @property
    def step_seconds(self) -> float:
        """Of the clock: the mean of the middle half of the steps. The kernel may date a file to 4
        ms only, which a median would keep."""
        taken = sorted(self.run.lines[i][0] for i in self.steps)
        quarter = len(taken) // 4
        return mean(taken[quarter : len(taken) - quarter])

    @property
    def cpu_seconds(self) -> float:
        """Of a step on all ranks: a mean, as the ends of single steps are not known well."""
        return mean(self.run.lines[i][1] for i in self.steps)

    @property
    def log_seconds(self) -> float:
        return median(self.run.metrics[i]["seconds/log"] for i in self.steps)


def main(argv: list[str]) -> int:
    options, words = read_words(argv)
    ways = options["ways"].split(",")
    output = Path(options["output"])
    output.mkdir(parents=True, exist_ok=True)
    print(f"{hardware()}; runs and their output: {output}\n", flush=True)
    words = with_tokenizer(words, output / "tokenizer")
    seen: dict[str, list[Seen]] = {way: [] for way in ways}
    for pair in range(int(options["pairs"])):
        for way in ways:
            run_dir = output / f"{way}-{pair}"
            seen[way].append(
                see(way, words, int(options["ranks"]), float(options["every"]), run_dir)
            )
    report_steps(seen)
    if "watch" in seen:
        report_watchers(seen["watch"])
    report_bytes(seen)
    if int(options["page"]):
        report_pages(int(options["page"]), options["tokens"].split(","), output)
    return 0


def read_words(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """Our own options, and the recipe's arguments."""
    gpu = torch.cuda.is_available()
    options = {
        "pairs": "3", "ways": ",".join(DEFAULT), "ranks": "1" if gpu else "2", "every": "5",
        "page": "1000", "tokens": "40", "output": "",
    }  # fmt: skip
    options |= dict(word.split("=", 1) for word in argv if word.partition("=")[0] in options)
    counts = [options["pairs"], options["ranks"], options["every"], *options["tokens"].split(",")]
    known = set(options["ways"].split(",")) <= set(WAYS) and options["page"].isdecimal()
    if not known or not all(count.isdecimal() and int(count) for count in counts):
        raise SystemExit(__doc__)
    options["output"] = options["output"] or tempfile.mkdtemp(prefix="bench-seeing-")
    words = [word for word in argv if word.partition("=")[0] not in options]
    more = [f"steps={10 if gpu else 30}", "eval.every=0", "eval.num_prompts=8"]
    return options, sized(words, *more)


def see(way: str, words: Sequence[str], ranks: int, every: float, run_dir: Path) -> Seen:
    """Make one run, which is watched if the way says so."""
    with watching(run_dir, every) if way == "watch" else nullcontext() as watched:
        run = run_recipe("grpo", ranks, [*words, *WAYS[way]], run_dir)
    return Seen(run, watched)


def report_steps(seen: Mapping[str, Sequence[Seen]]) -> None:
    """Print a row for each way: medians over its runs, and ratios to the runs of the same turn, of
    the wall time of a step and of its CPU time."""
    bases = [way for way in ("off", "on") if way in seen]
    heads = [f"{time} to `{base}`" for base in bases for time in ("s", "CPU s")]
    print_row("way", "step s", "CPU s of all ranks", "seconds/log ms", *heads)
    print_row(*["---"] * (4 + len(heads)))
    for way, runs in seen.items():
        wall, cpu = times_of(runs)
        log = median(one.log_seconds for one in runs)
        numbers = [f"{median(wall):.4f}", f"{median(cpu):.4f}", f"{1e3 * log:.2f}"]
        pairs = [
            pair for base in bases for pair in zip((wall, cpu), times_of(seen[base]), strict=True)
        ]
        print_row(f"`{way}`", *numbers, *(spread(ratios(*pair)) for pair in pairs))


def times_of(runs: Sequence[Seen]) -> tuple[list[float], list[float]]:
    """Seconds of a step in each run: by the clock, and of CPU time."""
    return [one.step_seconds for one in runs], [one.cpu_seconds for one in runs]


def ratios(own: Sequence[float], base: Sequence[float]) -> list[float]:
    """Times to those of another way, turn by turn."""
    return [a / b for a, b in zip(own, base, strict=True)]


def report_watchers(runs: Sequence[Seen]) -> None:
    """Print what the server of the live page took."""
    print("\n`tools/watch.py` beside a run\n")
    print_row("answers with new data", "kB each, as sent", "CPU s", "of a core")
    print_row(*["---"] * 4)
    for one in runs:
        assert one.watched is not None, "it is watched"
        answers, cpu = one.watched.answers, one.watched.cpu_seconds
        size = one.watched.sent / max(answers, 1) / 1e3
        share = cpu / one.run.wall_seconds
        print_row(str(answers), f"{size:.0f}", f"{cpu:.2f}", f"{share:.1%}")


def report_bytes(seen: Mapping[str, Sequence[Seen]]) -> None:
    """Print what a run of each way has written a step, by file; of an evaluation before and after
    it, too."""
    runs = {way: found[-1].run for way, found in seen.items()}
    by_way = {way: sizes(run.run_dir) for way, run in runs.items()}
    print("\nbytes a step\n")
    print_row("file", *(f"`{way}`" for way in runs))
    print_row(*["---"] * (1 + len(runs)))
    for name in sorted({name for found in by_way.values() for name in found}):
        each = (by_way[way].get(name, 0) / run.metrics[-1]["step"] for way, run in runs.items())
        print_row(name, *(f"{size:,.0f}" for size in each))


def sizes(run_dir: Path) -> dict[str, int]:
    """Bytes of what lies in a run directory, by name; a folder counts as one."""
    found: dict[str, int] = {}
    for path in run_dir.rglob("*"):
        name = path.relative_to(run_dir).parts[0]
        if path.is_file() and name not in ONCE:
            found[name] = found.get(name, 0) + path.stat().st_size
    return found


def report_pages(steps: int, tokens: Sequence[str], output: Path) -> None:
    """Print what building the report of a synthetic run takes, for each length of responses."""
    print(f"\nthe report of {steps:,} steps\n")
    print_row("tokens a response", "samples MB", "page MB", "s", "CPU s")
    print_row(*["---"] * 5)
    for length in tokens:
        run_dir = output / f"page-{length}"
        making = [str(ROOT / "tests" / "report_runs.py"), str(run_dir)]
        run_tool(*making, f"steps={steps}", f"tokens={length}")
        began, before = time.monotonic(), children_cpu_seconds()
        run_tool(str(ROOT / "tools" / "report.py"), str(run_dir))
        taken, cpu = time.monotonic() - began, children_cpu_seconds() - before
        files = (run_dir / "samples.jsonl.gz", run_dir / "report.html")
        print_row(length, *(f"{path.stat().st_size / 1e6:.2f}" for path in files),
                  f"{taken:.2f}", f"{cpu:.2f}")  # fmt: skip


def run_tool(*command: str) -> None:
    """Run a program of this repository, which must succeed."""
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
