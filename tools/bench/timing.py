"""Time functions in turn, so that other load on the machine affects all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch
import torch.distributed as dist

from mesh.invariant.switch import batch_invariant, current, use_fallback, use_ordinary_softmax
from mesh.model.products import self_test_of
from mesh.types import ModelShape

CHUNKS = 4


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
    """Median seconds of each function over `repeats` turns, after a warm-up turn."""
    return [median(taken) for taken in in_turn(*functions, repeats=repeats)]


def in_turn(*functions: Callable[[], object], repeats: int) -> list[list[float]]:
    """Seconds of each function in each of `repeats` turns, after a warm-up turn."""
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(repeats):
        for taken, function in zip(times, functions, strict=True):
            with stopwatch(taken):
                function()
    return times


@contextmanager
def stopwatch(taken: list[float]) -> Iterator[None]:
    """Append the seconds of a block to `taken`: GPU time, or without a GPU this process's CPU time,
    which other processes do not lengthen.
    """
    if torch.cuda.is_available():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end) / 1e3)
    else:
        began = time.process_time()
        yield
        taken.append(time.process_time() - began)


class Switch:
    """Turns batch invariance on as a run does, with the kernels that one self-test chose."""

    def __init__(self, shape: ModelShape, dtype: torch.dtype, device: torch.device) -> None:
        self.device_type = device.type
        group = dist.group.WORLD
        assert group is not None, "the self-test is a collective of a world, if only of one"
        with batch_invariant(True, device.type, CHUNKS):
            print(self_test_of(shape, CHUNKS, dtype, device, group), flush=True)
            chosen = current()
            assert chosen is not None, "the switch is on here"
            self.choices = chosen.choices

    @contextmanager
    def __call__(self, on: bool) -> Iterator[None]:
        with batch_invariant(on, self.device_type, CHUNKS):
            if on:
                use_fallback(self.choices.tiled)
                use_ordinary_softmax(self.choices.widths)
            yield
