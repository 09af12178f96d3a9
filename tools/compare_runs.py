"""Compare two runs to the bit: metrics except timings, samples, final and best models.

    python tools/compare_runs.py A B

A and B are run directories. Prints the first difference: file, step, key and both values. Exit
status 0: equal to the bit, 1: different, 2: one of them cannot be read. Left out: configurations,
environments, checkpoints, and best models if one of the two runs keeps none.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mesh.config.keys import refuse
from mesh.config.run_format import run_format_problems
from mesh.runs.compare import compare_runs


def main(argv: list[str]) -> int:
    if len(argv) != 2 or argv[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        refuse([line for run in argv for line in run_format_problems(run)])
        compared = compare_runs(Path(argv[0]), Path(argv[1]))
    except (ValueError, OSError) as error:
        print(f"unreadable: {error}", file=sys.stderr)
        return 2
    if compared.first is not None:
        print(f"different: {compared.first}")
        return 1
    counts = f"{compared.steps} lines of metrics, {compared.samples} samples"
    print(f"equal: {counts}, {compared.files} files of models")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
