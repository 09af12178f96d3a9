"""The nouns that more than one part of the program shares.

Shape suffixes, one key for the whole package: P prompts, G rollouts per prompt, R = P*G rollouts,
L padded length, T packed tokens, V vocabulary, D model dim, N heads, K kv heads, H head dim,
S sequences in a decode batch. A suffix names logical dims, never the sharding.
"""

from mesh.types.prompts import (
    Message,
    NumberedPrompt,
    Prompt,
    Reply,
    TurnText,
)
from mesh.types.rollouts import (
    FINISH_REASONS,
    LARGEST_REWARD,
    TRUNCATED,
    Completion,
    Distribution,
    FinishReason,
    Outline,
    Parts,
    Request,
    Rollout,
    RolloutKey,
    Sample,
    Sampling,
    Turn,
    Wave,
    outline,
)
from mesh.types.shapes import (
    IdSpans,
    ModelShape,
    RopeScaling,
)

__all__ = [
    "Completion",
    "Distribution",
    "FINISH_REASONS",
    "FinishReason",
    "IdSpans",
    "LARGEST_REWARD",
    "Message",
    "ModelShape",
    "NumberedPrompt",
    "Outline",
    "Parts",
    "Prompt",
    "Reply",
    "Request",
    "Rollout",
    "RolloutKey",
    "RopeScaling",
    "Sample",
    "Sampling",
    "TRUNCATED",
    "Turn",
    "TurnText",
    "Wave",
    "outline",
]
