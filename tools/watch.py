"""Serve the report of a run while it goes on: the command of tools/watch/main.py."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder
    from tools.watch.main import main

    sys.exit(main(sys.argv[1:]))
