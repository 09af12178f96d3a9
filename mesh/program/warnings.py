"""What a run is warned about at its start: it can run, and would not compute what it seems to."""

from __future__ import annotations

from mesh.config.keys import shown
from mesh.program.plan import Plan


def start_warnings(plan: Plan) -> list[str]:
    """The warnings of a program that trains on its own rollouts, each a line."""
    return truncation_warnings(plan)


def truncation_warnings(plan: Plan) -> list[str]:
    """Truncated sampling, under which the tokens come from another distribution than that of the
    logprobs, whose gradient is then not that of the expected reward.
    """
    generator, vocab_size = plan.generator, plan.shape.vocab_size
    keys = {
        "generator.top_k": (generator.top_k, 0, 0 < generator.top_k < vocab_size),
        "generator.top_p": (generator.top_p, 1, generator.top_p < 1),
    }
    cut = {name: pair for name, (*pair, truncates) in keys.items() if truncates}
    if not cut:
        return []
    given = " ".join(f"{name}={shown(value)}" for name, (value, _) in cut.items())
    remedy = " ".join(f"{name}={shown(off)}" for name, (_, off) in cut.items())
    return [
        f"warning: {given}: tokens are drawn from the truncated distribution, and the logprobs of "
        "both sides are those of the untruncated one, so the policy gradient is biased although "
        f"logprob_diff does not show it; set {remedy}"
    ]
