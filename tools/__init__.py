"""Command-line tools around the recipes: benchmarks, kills and resumes, a Monarch launcher."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # the repository
