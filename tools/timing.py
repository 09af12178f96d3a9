"""Functions timed in turn, so that whatever else a machine does disturbs all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch


def captured(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`function` as a CUDA graph, warmed up first."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def paired(*functions: Callable[[], object], repeats: int) -> list[float]:
    """Median seconds of each function over `repeats` turns, after one that is not counted."""
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(repeats):
        for taken, function in zip(times, functions, strict=True):
            with stopwatch(taken):
                function()
    return [median(taken) for taken in times]


@contextmanager
def stopwatch(taken: list[float]) -> Iterator[None]:
    """Adds the seconds of a block to `taken`; on a GPU those of its work there."""
    if torch.cuda.is_available():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end) / 1e3)
    else:
        began = time.perf_counter()
        yield
        taken.append(time.perf_counter() - began)
