"""Write the report of runs as one HTML file: the command of tools/report/main.py."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder
    from tools.report.main import main

    sys.exit(main(sys.argv[1:]))
