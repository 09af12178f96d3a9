"""The program of a process of the mesh, and with HOST:PORT of a host that `serve=` offers."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The repository, not this folder; a job puts its script's folder here.
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from tools.monarch.procs import host, work

    host(sys.argv[1]) if len(sys.argv) > 1 else work()
