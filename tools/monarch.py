"""Run a recipe on a Monarch proc mesh: the command of tools/monarch/launcher.py."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # The repository, not this folder: so `monarch` is the installed package.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from tools.monarch.launcher import main

    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # Monarch's threads can abort an interpreter that ends beneath them
