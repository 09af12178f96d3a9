"""Random checkpoints of every family, each with what is awkward in it."""

from __future__ import annotations

from tiny_qwen3 import MAX_LENGTH, Variant

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 40,
}  # fmt: skip
# the context that RoPE is stretched from is 40 of 128 tokens; heads 8:1 and 9:3; odd vocabularies
VARIANTS = {
    "llama 3": Variant(0, family="llama", tied=False, heads=8, kv_heads=1, rope=LLAMA3,
                       vocab_size=97),
    "smollm2": Variant(1, family="llama", heads=9, kv_heads=3, dim=72, head_dim=None, theta=1e5,
                       pad_id=2),
    "llama linear": Variant(2, family="llama", tied=False, kv_heads=4,
                            rope={"rope_type": "linear", "factor": 4.0}),
    "qwen2 tied": Variant(3, family="qwen2", heads=8, kv_heads=1, head_dim=None, theta=1e6,
                          vocab_size=101),
    "qwen2 untied": Variant(4, family="qwen2", tied=False, kv_heads=2, rope=LLAMA3),
    "mistral": Variant(5, family="mistral", tied=False, others={"sliding_window": None}),
    "mistral within its window": Variant(6, family="mistral", tied=False,
                                         others={"sliding_window": MAX_LENGTH}),
    "qwen3 scaled": Variant(7, heads=8, kv_heads=1, rope=LLAMA3, vocab_size=97),
}  # fmt: skip

OF_CHARACTERS = {"vocab_size": 128, "kv_heads": 2, "head_dim": None}
RUNNING = {  # which the shipped tokenizer fits, and two or four ranks
    "llama": Variant(0, family="llama", heads=6, dim=96, rope=LLAMA3, **OF_CHARACTERS),
    "qwen2": Variant(1, family="qwen2", tied=False, **OF_CHARACTERS),
    "mistral": Variant(
        2, family="mistral", tied=False, others={"sliding_window": None}, **OF_CHARACTERS
    ),
}
