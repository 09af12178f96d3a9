"""The losses that ship, by name. docs/losses.md has the same table in words."""

from __future__ import annotations

from mesh.rl.losses.distillation import no_reward
from mesh.rl.losses.nouns import Loss, Need
from mesh.rl.losses.surrogates import (
    cispo_surrogate,
    clipped_surrogate,
    cross_entropy,
    gspo_surrogate,
    rloo_surrogate,
    sapo_surrogate,
)

OF_SEQUENCES: frozenset[Need] = frozenset({"sequence_ratio"})

LOSSES: dict[str, Loss] = {
    # DeepSeekMath, arXiv:2402.03300
    "grpo": Loss(clipped_surrogate, "std", "sequence"),
    # Dr. GRPO, arXiv:2503.20783
    "dr_grpo": Loss(clipped_surrogate, "centred", "constant"),
    # TRL's loss_type=bnpo, but averaged over the whole step
    "bnpo": Loss(clipped_surrogate, "std", "token"),
    # arXiv:2503.14476; its refilled groups and its length penalty are keys of the run
    "dapo": Loss(clipped_surrogate, "std", "token", settings={"clip_high": 0.28}),
    # arXiv:2402.14740
    "rloo": Loss(rloo_surrogate, "leave_one_out", "sum", OF_SEQUENCES),
    # REINFORCE++, arXiv:2501.03262
    "reinforce_pp": Loss(clipped_surrogate, "whitened", "token"),
    "reinforce_pp_baseline": Loss(clipped_surrogate, "centred_whitened", "token"),
    # arXiv:2507.18071
    "gspo": Loss(gspo_surrogate, "std", "sequence", OF_SEQUENCES, widest=0.1),
    # MiniMax-M1, arXiv:2506.13585
    "cispo": Loss(cispo_surrogate, "std", "token"),
    # arXiv:2511.20347
    "sapo": Loss(sapo_surrogate, "std", "sequence"),
    # arXiv:2602.02710
    "max_rl": Loss(clipped_surrogate, "mean", "token"),
    # GKD, arXiv:2306.13649, with all data from the student
    "distill": Loss(clipped_surrogate, no_reward, "token", teacher_coef=1.0),
}

CROSS_ENTROPY = Loss(cross_entropy, aggregation="token")
