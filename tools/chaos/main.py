"""Kill real runs with kill -9 and resume them, in a loop: rung L5 of the exactness ladder.

    python tools/chaos.py conf=qwen3_tiny rounds=50 [seed=0] [ranks=4] [first=0 | only=N] [dir=DIR]

A round starts a small run, kills it in the phase that the schedule names (one rank, all ranks, or
torchrun as well) and resumes it; every third round kills the resumed run again. On the same mesh
the finished run must equal an uninterrupted run bit for bit. On another mesh its weights and
moments must be those that were saved, log lines before the checkpoint must not change, and the logs
must have no gap and no duplicate. No process and no partial directory may be left. Where a kill
comes before the first checkpoint, resuming must be refused, and the run starts over.

Prints a line per round, then a table per phase. Exit status 1 if a round fails; its directory is
kept, and `only=N` with the same `rounds`, `seed` and `ranks` plans it again (the moment within the
phase depends on the machine). `ranks`: largest number of ranks of a mesh. Other arguments go to the
recipe. Left out: GPUs, several hosts, loss of power (nothing here tests fsync).
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tools.chaos.phase_reporter import ALL_OF
from tools.chaos.plan import Round, plan
from tools.chaos.rounds import Chaos, Outcome

OPTIONS = {"rounds": "50", "seed": "0", "ranks": "4", "first": "0", "only": "", "dir": ""}


def main(argv: list[str]) -> int:
    options, words = read_options(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # jobs end with it
    rounds = plan(int(options["rounds"]), int(options["seed"]), int(options["ranks"]))
    first, last = int(options["first"]), len(rounds)
    if options["only"]:
        first = int(options["only"])
        last = first + 1
    folder = Path(options["dir"] or tempfile.mkdtemp(prefix="mesh-chaos-")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"runs and their output: {folder}", flush=True)
    chaos = Chaos(words, folder)
    done: list[tuple[Round, Outcome]] = []
    for planned in rounds[first:last]:
        began = time.monotonic()
        outcome = chaos.run(planned)
        done.append((planned, outcome))
        print(line(planned, outcome, time.monotonic() - began), flush=True)
    print(f"\n{table(done)}\n\n{verdict(done)}")
    failed = [planned.number for planned, outcome in done if outcome.problems]
    for number in failed:
        same = " ".join(f"{name}={options[name]}" for name in ("rounds", "seed", "ranks"))
        print(f"round {number} failed: {chaos.folder_of(number)}; repeat: only={number} {same}")
    return 1 if failed or not done else 0


def read_options(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """Our own options, and the recipe's arguments, which must include conf=."""
    given = dict(word.split("=", 1) for word in argv if word.partition("=")[0] in OPTIONS)
    words = [word for word in argv if word.partition("=")[0] not in OPTIONS]
    options = OPTIONS | given
    numbers = [value for name, value in options.items() if name != "dir" and value]
    named = any(word.startswith("conf=") for word in words)
    if not named or not all(value.isdigit() for value in numbers):
        raise SystemExit(__doc__)
    return options, words


def line(planned: Round, outcome: Outcome, seconds: float) -> str:
    """One line on a round."""
    words = [f"round {planned.number:2}", " -> ".join(planned.meshes)]
    steps = [*outcome.resumed, *([None] * len(planned.kill_points))]
    for point, kill, step in zip(planned.kill_points, outcome.kills, steps, strict=False):
        then = "no checkpoint yet, started over" if step is None else f"resumed from step {step}"
        where = f"in {kill.phase} of rank {kill.rank} after {kill.steps} steps"
        words.append(f"{point.victims} killed {where}, gone in {kill.gone_seconds:.1f} s; {then}")
    if outcome.missed:
        words.append(f"missed {outcome.missed} times")
    result = "FAILED: " + "; ".join(outcome.problems) if outcome.problems else outcome.result
    return "  ".join([*words, result, f"{seconds:.0f} s"])


def table(done: list[tuple[Round, Outcome]]) -> str:
    """Kills by the phase of the victim, and how many of them were in failed rounds."""
    kills: Counter[str] = Counter()
    bad: Counter[str] = Counter()
    for _, outcome in done:
        phases = [kill.phase for kill in outcome.kills]
        kills.update(phases)
        bad.update(phases if outcome.problems else [])
    rows = [f"{phase:<12}{kills[phase]:>6}{bad[phase]:>18}" for phase in ALL_OF]
    return "\n".join([f"{'phase':<12}{'kills':>6}{'in failed rounds':>18}", *rows])


def verdict(done: list[tuple[Round, Outcome]]) -> str:
    """Counts over all rounds."""
    outcomes = [outcome for _, outcome in done]
    kills = sum(len(outcome.kills) for outcome in outcomes)
    changes = sum(outcome.changes for outcome in outcomes)
    restarted = sum(outcome.resumed.count(None) for outcome in outcomes)
    exact = sum(outcome.exact and not outcome.problems for outcome in outcomes)
    failed = sum(bool(outcome.problems) for outcome in outcomes)
    return (
        f"{len(done)} rounds, {kills} kills, {changes} resumed on another mesh, {restarted} "
        f"started over, {exact} equal to the bit to an uninterrupted run, {failed} failed"
    )
