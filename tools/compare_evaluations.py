"""Compare two evaluations of the same questions, problem by problem.

    python tools/compare_evaluations.py A B

A and B are files of results: `eval.results` of recipes/evaluate.py, or evaluations/step-N.jsonl of
a run with log.evaluations=true. Prints, for each metric that both have, the mean of A, that of B
and their difference, each with a 95% interval: a bootstrap over problems, paired, whose seed is
fixed. A star marks a difference whose interval leaves out 0. Exit status 0, or 2: one of them
cannot be read, or their questions differ. Left out: a correction for many comparisons at once.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mesh.runs.evaluations import compare_results, comparison_table, read_results


def main(argv: list[str]) -> int:
    if len(argv) != 2 or argv[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        rows = [read_results(Path(name)) for name in argv]
        lines = comparison_table(compare_results(*rows))
    except (ValueError, OSError) as error:
        print(f"cannot be compared: {error}", file=sys.stderr)
        return 2
    print("\n".join([f"{len(rows[0])} problems", *lines]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
