"""Requests to stop that arrive through a pipe, for which two threads of a failing rank wait."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator

import pytest

from mesh.lifecycle.ending import signalled_within


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe2(os.O_NONBLOCK)
    yield ends
    for end in ends:
        os.close(end)


@pytest.mark.parametrize(
    ("number", "heard"), [(signal.SIGINT, True), (signal.SIGTERM, True), (signal.SIGCHLD, False)]
)
def test_a_request_to_stop_is_heard_once(pipe, number, heard):
    os.write(pipe[1], bytes([number]))
    assert signalled_within(pipe[0], 1.0) is heard
    assert not signalled_within(pipe[0], 0.0)


def test_a_signal_that_another_thread_has_read_blocks_nobody(pipe, monkeypatch):
    """Both threads wake up, and the other one is faster."""
    monkeypatch.setattr(select, "select", lambda readable, *_: (readable, [], []))
    assert not signalled_within(pipe[0], 1.0)
