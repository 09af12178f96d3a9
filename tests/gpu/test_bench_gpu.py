"""Time of kernels, by which tools.bench.loss_time judges on a GPU. Seconds."""

from __future__ import annotations

import time

import pytest
import torch

from tools.bench.timing import kernel_seconds

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)


def test_time_of_kernels_counts_neither_waiting_nor_copies():
    left = torch.randn(4096, 4096, device="cuda")

    def work(times: int, waits: float) -> None:
        for _ in range(times):
            left @ left
            time.sleep(waits)
        left.cpu()

    work(1, 0.0)
    once, often, waiting = (
        kernel_seconds(lambda a=a: work(*a)) for a in ((2, 0), (20, 0), (2, 0.2))
    )
    assert once == pytest.approx(waiting, rel=0.5) and waiting < 0.2
    assert often == pytest.approx(10 * once, rel=0.5)
