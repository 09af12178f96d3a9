"""The verdict of a replay: the module at which two traces of one sequence diverge."""

from __future__ import annotations

from dataclasses import dataclass

from mesh.exactness.trace import ModuleDifference, Trace, first_difference, first_not_finite
from mesh.model.tracer import LOGPROBS

AGREED = "not reproduced: both sides agree when run again"
NOT_REPRODUCED = (
    "the replay agrees on both sides: the difference does not reproduce, so some kernel is not "
    "deterministic, or not the same in forward passes alone (the replay computes no gradients and "
    "uses no CUDA graphs)"
)


@dataclass(frozen=True)
class Verdict:
    """The finding of a replay, in words, and the module and position that it names, if any."""

    text: str
    module: str | None = None
    position: int | None = None
    difference: ModuleDifference | None = None

    @property
    def short(self) -> str:
        """The module for a table, marked where both sides agree or its output is not finite."""
        if self.module is None:
            return AGREED
        return self.module if self.difference is not None else f"{self.module} (not finite)"


def judge(trained: Trace, generated: Trace) -> Verdict:
    """The first divergent module of two traces of a sequence."""
    found = first_difference(trained, generated)
    if found is None:
        broken = first_not_finite(trained)
        if broken is None:
            return Verdict(NOT_REPRODUCED)
        text = "the replay agrees on both sides: the first output that is not finite is that of"
        return Verdict(f"{text} {broken[0]} at position {broken[1]} of the sequence", *broken)
    features = (
        f"feature {found.feature} of {found.width} is {found.values[0]!r} on the trainer and "
        f"{found.values[1]!r} on the generator, {found.count} differ"
    )
    where = f"{found.module} at position {found.position} of the sequence"
    text = f"first divergent module: {where} ({features})"
    if found.module == LOGPROBS:
        text = f"the hidden states are equal up to the logprob function: {where} ({features})"
    return Verdict(text, found.module, found.position, found)
