"""Kill real runs with kill -9 and resume them: the command of tools/chaos/main.py."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder
    from tools.chaos.main import main

    sys.exit(main(sys.argv[1:]))
