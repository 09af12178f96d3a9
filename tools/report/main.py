"""Write the report of one run, or of several that are compared, as one HTML file.

    python tools/report.py RUN_DIR [OTHER_RUN ...] [output=FILE] [title=TEXT] [hide=hosts,paths]
    python tools/report.py RUN_DIR picture=FILE.svg

The file needs no network and no other file: RUN_DIR/report.html unless `output` names another. A
run that is going on, was killed or lost files is shown as far as it can be read, and the page says
what is missing. `title`: heading of the page in place of the first run's name. `hide=hosts,paths`,
or one of both, leaves out names of machines, and paths and names of users, so that the file can be
shared. `picture`: write the learning curve as an SVG in place of the page; with `output`, too.
Exit status 2 where a directory holds no run, an option is wrong or the file cannot be
written.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tools.report.build import report_data
from tools.report.html import page
from tools.report.options import read_options
from tools.report.picture import learning_curve
from tools.report.reading import read_run


def main(argv: Sequence[str]) -> int:
    try:
        run_dirs, options = read_options(argv, __doc__ or "")
        if options.picture is not None:
            write(options.picture, learning_curve(read_run(run_dirs[0])))
        if options.output is not None or options.picture is None:
            data = report_data(run_dirs, options)
            write(options.output or run_dirs[0] / "report.html", page(data))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def write(path: Path, text: str) -> None:
    """Write a file, and say where it is and how large."""
    content = text.encode()
    path.write_bytes(content)
    print(f"{path}  {len(content) / 1e6:.2f} MB")
