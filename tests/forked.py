"""Ranks that are forks of one process, which has done their imports: for programs of the tests.

The start of a rank costs seconds of imports under torchrun, and nothing here. Recipes are launched
by torchrun, as users launch them.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.connection import wait


def run_ranks(num_ranks: int, main: Callable[[], None]) -> None:
    """Run `main` on ranks that find torchrun's variables; the first that fails ends them all.

    To be called where no thread has been started yet, so not in a process that runs tests.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    ranks = [
        fork.Process(target=_as_rank, args=(rank, num_ranks, port, main))
        for rank in range(num_ranks)
    ]
    for process in ranks:
        process.start()
    while running := [process for process in ranks if process.is_alive()]:
        wait([process.sentinel for process in running])
        if any(process.exitcode for process in ranks):
            for process in running:
                process.kill()
            sys.exit(1)


def _as_rank(rank: int, num_ranks: int, port: int, main: Callable[[], None]) -> None:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_PORT": port}
    variables = {name: str(value) for name, value in own.items()}
    os.environ |= variables | {"LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1"}
    main()
