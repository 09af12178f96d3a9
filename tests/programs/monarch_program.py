"""What a process does that `test_monarch.py` starts: `monarch_program.py DIRECTORY WHAT`.

It needs no torch, so that starting it is cheap.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

NAMES = """
    RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE MASTER_ADDR
    OMP_NUM_THREADS TORCHELASTIC_RESTART_COUNT TORCHELASTIC_USE_AGENT_STORE
"""


def main(directory: Path, what: str) -> None:
    rank, attempt = os.environ["RANK"], int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    (directory / f"{attempt}-{rank}-{os.getpid()}").touch()
    if what == "report":
        variables = {name: os.environ.get(name) for name in NAMES.split()}
        in_main = threading.current_thread() is threading.main_thread()
        report = [variables, [sys.argv, sys.path[0], __name__, os.getcwd(), in_main]]
        say(json.dumps(report))
        sys.exit(3 if rank == "1" else 0)
    elif what == "last words" and rank == "1":
        os.write(2, f"the last words of start {attempt}\n".encode())
        os._exit(7)
    elif what == "last words" and attempt == 1:
        leave_after_rank_1(directory, attempt)
    elif what == "once" and attempt == 0 and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "once" and attempt == 0:
        leave_after_rank_1(directory, attempt)
    elif what == "once":
        say(f"rank {rank} ends well")
        if rank == "0":
            os._exit(0)  # as a guard does whose last words took too long
    else:
        if what == "deaf":
            heard = directory / f"heard-{rank}-{os.getpid()}"
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: heard.touch())
        child = subprocess.Popen(["sleep", "600"])
        (directory / f"{attempt}-{rank}-{child.pid}").touch()
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline:
            time.sleep(1)


def say(line: str) -> None:
    """In one piece, as the ranks share a pipe: what Monarch starts does not buffer."""
    sys.stdout.write(line + "\n")


def leave_after_rank_1(directory: Path, attempt: int) -> None:
    """At once, as the guard of a recipe does."""
    while not (files := list(directory.glob(f"{attempt}-1-*"))):
        time.sleep(0.001)
    while Path("/proc", files[0].name.split("-")[2]).exists():
        time.sleep(0.001)
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
