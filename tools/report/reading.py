"""A run directory, as far as it can be read.

Whatever is missing, damaged or of the wrong type becomes a sentence of `Run.missing`; nothing of it
raises. Only a directory that holds no run at all is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from mesh.config.loading import flatten
from mesh.config.text import load_yaml
from mesh.runs.samples import OLD_SAMPLES, SAMPLES
from tools.report.lines import Damage, Line, records
from tools.report.thinning import evenly

MARKS = ("metrics.jsonl", "config.yaml", "environment.json")
MOST_PROFILES = 8  # that are shown
MOST_PROFILE = 20_000  # characters of a profile's table that are shown


@dataclass
class Run:
    """What a run directory holds. settings: of config.yaml, by dotted key; samples: the file of
    rollouts, None: there is none; checkpoints: steps of those that are complete."""

    path: Path
    metrics: list[Line] = field(default_factory=list)
    timeline: list[Line] = field(default_factory=list)
    samples: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    environments: list[Line] = field(default_factory=list)
    validation: Line | None = None
    strict: Line | None = None
    profiles: list[tuple[str, str]] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """The last step that was logged."""
        return max((line["step"] for line in self.metrics), default=0)


def read_run(path: Path) -> Run:
    """Read a run directory. Raises ValueError where it holds no run."""
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory; name the directory of a run")
    if not any((path / name).exists() for name in MARKS):
        raise ValueError(f"{path} holds no run (none of {', '.join(MARKS)}); name its directory")
    run = Run(path)
    run.metrics = in_order(lines_of(run, "metrics.jsonl", "no curve can be drawn"), run)
    run.timeline = lines_of(run, "timeline.jsonl", "who worked and who waited is not known")
    run.samples = samples_file(run)
    run.settings = settings_of(run)
    run.environments = environments_of(run)
    run.validation = json_of(run, path / "validation.json")
    run.strict = json_of(run, path / "strict.json")
    run.profiles = [*profiles_of(run)]
    run.checkpoints = checkpoints_of(path)
    return run


def lines_of(run: Run, name: str, otherwise: str) -> list[Line]:
    """The records of a file of JSON lines."""
    path = run.path / name
    if not path.exists():
        run.missing.append(f"There is no {name}: {otherwise}.")
        return []
    damage = Damage(name)
    found = [*records(path, damage)]
    run.missing += damage.sentences()
    if not found and not damage.sentences():
        run.missing.append(f"{name} is empty: {otherwise}.")
    return found


def in_order(lines: list[Line], run: Run) -> list[Line]:
    """One line per step, in order; of several the last."""
    by_step = {line["step"]: line for line in lines}
    if len(by_step) < len(lines):
        again = len(lines) - len(by_step)
        run.missing.append(f"metrics.jsonl has {again:,} steps twice; the later lines are shown.")
    return [by_step[step] for step in sorted(by_step)]


def samples_file(run: Run) -> Path | None:
    """The file of rollouts; runs of older versions have it uncompressed."""
    found = [run.path / name for name in (SAMPLES, OLD_SAMPLES) if (run.path / name).is_file()]
    if len(found) == 2:
        run.missing.append(f"The rollouts of {OLD_SAMPLES}, of an older version, are not shown.")
    if found:
        return found[0]
    run.missing.append("There is no samples.jsonl.gz: no rollout can be shown (log.samples=0).")
    return None


def settings_of(run: Run) -> dict[str, Any]:
    """The keys of config.yaml, whether this version knows them or not."""
    path = run.path / "config.yaml"
    if is_link(run, path):
        return {}
    try:
        content, _ = load_yaml(path.read_text())
    except FileNotFoundError:
        run.missing.append("There is no config.yaml: the configuration is not known.")
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        run.missing.append(f"config.yaml cannot be read ({reason}).")
    else:
        if isinstance(content, dict):
            return {str(s.name): s.value for s in flatten("", content, "")}
        run.missing.append("config.yaml holds no keys with values.")
    return {}


def is_link(run: Run, path: Path) -> bool:
    """True for a link, which may lead to a file that is not the run's: its text would be shown."""
    if not path.is_symlink():
        return False
    run.missing.append(f"{path.relative_to(run.path)} is a link, which is not followed.")
    return True


def environments_of(run: Run) -> list[Line]:
    """The environments of every start, the first one first."""

    def number(path: Path) -> int:
        found = re.fullmatch(r"environment-(\d+)\.json", path.name)
        return int(found[1]) if found else 1

    paths = sorted(run.path.glob("environment*.json"), key=number)
    if not paths:
        run.missing.append("There is no environment.json: machine and versions are not known.")
    return [found for path in paths if (found := json_of(run, path)) is not None]


def json_of(run: Run, path: Path) -> Line | None:
    """The JSON object of a file; None where there is none."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no JSON"
        run.missing.append(f"{path.name} cannot be read ({reason}).")
        return None
    if not isinstance(content, dict):
        run.missing.append(f"{path.name} is no JSON object.")
        return None
    return content


def profiles_of(run: Run) -> Iterator[tuple[str, str]]:
    """Names and tables of RUN_DIR/profiles."""
    for path in evenly(sorted((run.path / "profiles").glob("step-*.txt")), MOST_PROFILES):
        if is_link(run, path):
            continue
        try:
            yield path.stem, path.read_text(errors="replace")[:MOST_PROFILE]
        except OSError as error:
            run.missing.append(f"profiles/{path.name} cannot be read ({error.strerror}).")


def checkpoints_of(path: Path) -> list[int]:
    """Steps of the checkpoints, by the names of their directories."""
    names = (re.fullmatch(r"step-(\d+)", p.name) for p in (path / "checkpoints").glob("step-*"))
    return sorted(int(found[1]) for found in names if found)
