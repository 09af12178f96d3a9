"""Averaged weights in the generator, for as long as it is evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mesh.program.assembly import Program, sync


@contextmanager
def averaged_weights(program: Program) -> Iterator[None]:
    """The averaged weights of a run that has them in the generator for a block, then the newest
    again. Collective.

    The trainer's own weights are not touched. After an error nothing is put back: the run ends, and
    other ranks may not come to a sync.
    """
    if program.trainer.averages:
        sync(program, program.trainer.answering())
    yield
    if program.trainer.averages:
        sync(program)
