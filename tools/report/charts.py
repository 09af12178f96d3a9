"""The charts of the report: which metrics stand together, under which title, and what they mean.

A metric belongs to the first chart one of whose patterns it matches in full; every number that no
chart names stands in the group `Other metrics`, so that none is invisible. A group (...) in a
pattern is the label of its line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Chart:
    """One chart. patterns: of metric names, each with the label of its line, "" for what the
    pattern's group matches; percent: values are shares."""

    group: str
    id: str
    title: str
    help: str
    patterns: tuple[tuple[str, str], ...]
    unit: str = ""
    percent: bool = False


REWARD, RESPONSES, POLICY = "Reward", "Responses", "Policy"
OPTIMIZER, EXACT, PROMPTS, OTHER = "Optimizer", "Exactness", "Prompts and groups", "Other metrics"
EVALUATION = "Evaluation"
MEMORY, RATES = "Memory", "Rates"

CHARTS = (
    Chart(REWARD, "reward", "Reward", "Mean reward of the step's rollouts.",
          (("reward/mean", "mean"),)),
    Chart(REWARD, "reward-std", "Spread of the reward",
          "Standard deviation over all rollouts of the step; 0: nothing to learn from.",
          (("reward/std", "standard deviation"),)),
    Chart(REWARD, "reward-correct", "Correct responses",
          "Share of the responses that the score calls correct.",
          (("reward/correct", "correct"),), percent=True),
    Chart(REWARD, "reward-failed", "Failed scores",
          "Scores that hung or raised and counted as 0 (reward.on_failure=zero).",
          (("reward/failed", "failed"),)),
    Chart(REWARD, "reward-parts", "Parts of the reward", "Mean of each named part of the score.",
          ((r"reward/(.+)", ""),)),
    Chart(REWARD, "length-penalty", "Length penalty",
          "What long responses lose, on average, and the share of those that lose anything.",
          ((r"length_penalty/(.+)", ""),)),
    Chart(RESPONSES, "length", "Response length", "Tokens of a response.",
          (("response_length/mean", "mean"), ("response_length/max", "longest")), "tokens"),
    Chart(RESPONSES, "truncated", "Truncated responses",
          "Share of the responses that were cut at generator.max_new_tokens or the context.",
          (("response/truncated", "truncated"), ("truncated", "not ended by the model")),
          percent=True),
    Chart(RESPONSES, "finish", "Why conversations ended", "Share of the conversations.",
          ((r"finish/(.+)", ""),), percent=True),
    Chart(RESPONSES, "turns", "Turns", "Turns of the model in a conversation.",
          ((r"turns/(.+)", ""),)),
    Chart(RESPONSES, "tokens", "Tokens of a step",
          "Tokens that the model generated, that were trained on, and of replies.",
          ((r"tokens/(.+)", ""),), "tokens"),
    Chart(POLICY, "entropy", "Entropy",
          "Mean entropy of the trainer's distribution at the sampled tokens.",
          (("entropy", "entropy"),), "nats"),
    Chart(POLICY, "kl", "KL", "KL to the frozen starting model (kl_coef), or to the teacher.",
          (("kl", "to the starting model"), (r"(.+/kl|kl/.+)", "")), "nats"),
    Chart(POLICY, "clip", "Clip fraction", "Share of the tokens whose ratio was clipped.",
          (("clip_fraction", "clip fraction"),), percent=True),
    Chart(POLICY, "ratio", "Importance ratio",
          "Trainer's probability of a token divided by the one it was drawn with.",
          (("ratio/mean", "mean"), ("ratio/max", "largest"))),
    Chart(POLICY, "importance", "Importance correction",
          "Mean weight, and share of the tokens out of bounds (importance).",
          ((r"importance/(.+)", ""),)),
    Chart(POLICY, "approx-kl", "KL of the updates of a step",
          "Estimated KL from the policy that sampled, before each update.",
          ((r"update/(\d+)/approx_kl", "update "),), "nats"),
    Chart(OPTIMIZER, "grad-norm", "Gradient norm", "Before clipping.",
          (("grad_norm", "gradient norm"),)),
    Chart(OPTIMIZER, "lr", "Learning rate", "Of the step's updates.", (("lr", "learning rate"),)),
    Chart(OPTIMIZER, "loss", "Loss",
          "The value of the surrogate; near 0 by construction, and no measure of progress.",
          (("loss", "loss"),)),
    Chart(OPTIMIZER, "ema", "Averaged weights", "The exponential average of the weights (ema).",
          ((r"(ema.*)", ""),)),
    Chart(OPTIMIZER, "skipped", "Skipped and empty updates",
          "Updates of a step that were not finite (on_nonfinite=skip), and how many steps so far "
          "had no gradient.",
          (("skipped", "not finite"),
           ("steps_without_signal", "steps without signal, so far"))),
    Chart(OPTIMIZER, "updates", "Updates of a step", "Updates that were made (kl_stop).",
          (("updates", "updates"),)),
    Chart(OPTIMIZER, "update-norms", "Gradient norm of each update", "In their order.",
          ((r"update/(\d+)/grad_norm", "update "),)),
    Chart(EXACT, "logprob-diff", "Logprob difference, trainer and generator",
          "Absolute difference of a token's two logprobs; exactly 0 with batch_invariant=true.",
          (("logprob_diff/max", "largest"), ("logprob_diff/mean", "mean")), "nats"),
    Chart(PROMPTS, "equal-groups", "Equal groups",
          "Share of the groups whose rewards are all equal: they teach nothing.",
          (("equal_groups", "equal groups"),), percent=True),
    Chart(PROMPTS, "groups", "Dynamic sampling: groups", "Kept, surplus and missing groups.",
          ((r"groups/(.+)", ""),)),
    Chart(PROMPTS, "prompts", "Prompts", "Drawn, skipped and held out; rounds of drawing.",
          ((r"prompts/(.+)", ""),)),
    Chart(PROMPTS, "difficulty", "Difficulty", "Pass rates known, and prompts left out by them.",
          ((r"difficulty/(.+)", ""),)),
    Chart(POLICY, "teacher", "Teacher", "Distillation.", ((r"teacher/(.+)", ""),)),
)  # fmt: skip

SPEED_CHARTS = (
    Chart(RATES, "tokens-per-second", "Tokens per second", "By phase, of the whole world.",
          ((r"tokens_per_second/(.+)", ""),), "tokens/s"),
    Chart(RATES, "mfu", "MFU", "Share of the GPUs' peak that the phase reaches.",
          ((r"mfu/(.+)", ""),), percent=True),
    Chart(RATES, "sync", "Sync", "Seconds of a sync of the weights.",
          (("seconds/sync", "sync"),), "s"),
    Chart(RATES, "sync-rate", "Sync rate", "Bytes that a sync moves, by its seconds.",
          (("sync/gb_per_second", "rate"),), "GB/s"),
    Chart(RATES, "sync-size", "Size of a sync",
          "Bytes that a sync moves; 0 where trainer and generator share the weights.",
          (("sync/gb", "size"),), "GB"),
    Chart(MEMORY, "gpu-memory", "GPU memory", "Of the fullest GPU, at the end of a phase.",
          ((r"gpu_gb/(.+)", ""),), "GB"),
    Chart(MEMORY, "host-memory", "Host memory", "Resident memory of the largest rank.",
          (("host_gb", "largest rank"),), "GB"),
)  # fmt: skip

EVAL_CHARTS = (
    ("accuracy", "accuracy", True,
     r"accuracy|accuracy_greedy|(?:pass|majority|maj)@\d+",
     "Share of the held-out problems that are solved."),
    ("reward", "reward", False, r"reward(?:/.+)?", "Mean reward, and its parts."),
    ("length", "response length", False, r"response_length/.+", "Tokens of an answer."),
    ("truncated", "truncated answers", True, r"response/truncated", "Share of the answers."),
    ("other", "other metrics", False, r".+", "What else the evaluation measured."),
)  # fmt: skip
OF_EVALUATION = re.compile(
    r"eval(?:/(?P<set>[\w-]+(?=/)))??/(?P<rest>"
    r"accuracy|accuracy_greedy|(?:pass|majority|maj)@\d+|reward(?:/.+)?|response_length/.+|"
    r"response/truncated|failed|[^/]+)"
)


@cache
def chart_of(metric: str) -> tuple[Chart, str]:
    """The chart of a metric, and the label of its line there."""
    if found := OF_EVALUATION.fullmatch(metric):
        return evaluation_chart(found["set"] or "", found["rest"])
    for chart in (*SPEED_CHARTS, *CHARTS):
        for pattern, label in chart.patterns:
            if match := re.fullmatch(pattern, metric):
                return chart, label + (match[1] if match.groups() else "")
    return Chart(OTHER, f"other-{slug(metric)}", metric, "", ()), metric


def evaluation_chart(name: str, rest: str) -> tuple[Chart, str]:
    """The chart of one metric of an evaluation set; the run's own set has no name."""
    for kind, title, percent, pattern, meaning in EVAL_CHARTS:
        if re.fullmatch(pattern, rest):
            heading = f"{name}: {title}" if name else title.capitalize()
            where = f"Evaluation set {name}. " if name else "Held-out prompts. "
            unit = "tokens" if kind == "length" else ""
            key = f"eval-{slug(name)}-{kind}" if name else f"eval-{kind}"
            label = rest.removeprefix("response_length/").removeprefix("response/")
            return Chart(EVALUATION, key, heading, where + meaning, (), unit, percent), label
    raise AssertionError(f"no chart of {rest}")


def slug(text: str) -> str:
    """Letters, digits and dashes, for the id of an element."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


GROUPS = (
    EVALUATION, REWARD, RESPONSES, POLICY, OPTIMIZER, EXACT, PROMPTS, OTHER, RATES, MEMORY,
)  # fmt: skip
