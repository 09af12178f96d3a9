"""Problems of several updates a step."""

from __future__ import annotations

from mesh.config.keys import problem
from mesh.config.schema import Conf


def update_problems(conf: Conf) -> list[str]:
    """Minibatches that do not divide the groups, or that cannot be cut before the first update."""
    updates, found = conf.updates_per_step, []
    if updates > 1 and conf.num_prompts % updates:
        wrong = f"does not divide num_prompts={conf.num_prompts}, and a minibatch has whole groups"
        remedy = f"use a divisor, such as {nearest_divisor(conf.num_prompts, updates)}"
        found.append(problem("updates_per_step", updates, wrong, remedy))
    if updates > 1 and conf.waves > 1:
        wrong = (
            f"with updates_per_step={updates} all rollouts of a step are scored before its first "
            "update, so training cannot begin with a part of them"
        )
        found.append(problem("waves", conf.waves, wrong, "set waves=1, or updates_per_step=1"))
    if updates == 1 and conf.kl_stop is not None:
        wrong = "it leaves out updates after a step's first, and updates_per_step=1 has none"
        remedy = "leave it out, or set updates_per_step=2 or more"
        found.append(problem("kl_stop", conf.kl_stop, wrong, remedy))
    return found


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` that is nearest to `wanted`; of two the smaller."""
    divisors = [i for i in range(1, number + 1) if number % i == 0]
    return min(divisors, key=lambda i: (abs(i - wanted), i))
