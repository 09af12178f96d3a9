"""Configuration: nested dataclasses are schema and defaults, a YAML in `conf/` is a whole run, and
`key=value` words on the command line override it (`mesh/config/loading.py` reads both).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mesh.config.asking import ConversationConf, DifficultyConf, PromptConf, RewardConf
from mesh.config.declare import INF, key
from mesh.config.learning import TeacherConf
from mesh.config.sections import (
    CheckpointConf,
    EvalConf,
    ExportConf,
    GenerateConf,
    GeneratorConf,
    InvariantConf,
    LogConf,
    MeshConf,
    ModelConf,
    ProfileConf,
    SFTConf,
    StopConf,
    SyncConf,
    ValidateConf,
    VllmConf,
)
from mesh.config.trainer_section import TrainerConf


@dataclass(frozen=True)
class Conf:
    run_dir: str | None = key(None, "run directory; unset: runs/CONF-DATE-TIME")
    resume: str | None = key(
        None, "run directory of the run to continue, with its keys (in place of conf=)"
    )
    steps: int = key(100, "optimizer steps", ge=1)
    seed: int = key(0, "seed of every random number of the run", ge=0, lt=2**63)
    device: Literal["auto", "cpu", "cuda"] = key("auto", "auto: cuda where there is one")
    timeout_seconds: int = key(1800, "timeout of a collective, which ends the run [s]", ge=1)
    stall_seconds: int = key(
        900, "no rank makes progress for this long: print all stacks and end [s]; 0: never", ge=0
    )
    engine: Literal["native", "vllm"] = key("native", "generation engine")
    task: str = key(
        "spell_backward",
        "spell_backward, arithmetic, calculator, guess, dataset, gsm8k, reasoning_gym, or "
        "MODULE:CLASS for a task of your own",
    )
    task_args: dict[str, Any] = key({}, "the task's own settings, e.g. task_args.max_length=4")
    scores: list[str] = key(
        [], "MODULE:FUNCTION of score functions of your own, which are added to the task's score"
    )
    score_weights: list[float] = key([], "their weights, one for each; unset: 1 each")
    num_prompts: int = key(64, "prompts per step", ge=1)
    refill_rounds: int = key(
        0,
        "dynamic sampling: groups that are equal in refill_on are left out, and more prompts are "
        "drawn, at most so many times, until there are num_prompts others; 0: off",
        ge=0,
        le=1000,
    )
    refill_on: str = key(
        "reward",
        "what a group must not be equal in, to be trained on: reward, correct, or the name of a "
        "part of the score",
    )
    overlong: Literal["stop", "skip"] = key(
        "stop",
        "a training prompt that leaves no room for a response, or that the tokenizer cannot "
        "encode, ends the run; skip: another one is drawn in its place",
    )
    group_size: int = key(8, "rollouts per prompt", ge=2)
    waves: int = key(
        1, "parts that a step is generated in; split meshes overlap them with training", ge=1
    )
    updates_per_step: int = key(
        1, "minibatches of whole groups that a step's rollouts are cut into, an update each", ge=1
    )
    kl_stop: float | None = key(
        None,
        "with updates_per_step > 1: a step makes no further update once the policy's KL from the "
        "one that the step began with is above this; unset: all are made",
        gt=0,
        lt=INF,
    )
    loss: str = key(
        "grpo",
        "grpo, dr_grpo, bnpo, dapo, rloo, reinforce_pp, reinforce_pp_baseline, gspo, cispo, sapo, "
        "max_rl, distill, or MODULE:NAME for a loss of your own",
    )
    loss_args: dict[str, Any] = key({}, "the loss's own settings, e.g. loss_args.scale=0.5")
    advantage: (
        Literal["std", "centred", "leave_one_out", "mean", "whitened", "centred_whitened"] | None
    ) = key(None, "how rewards become advantages, a table of docs/losses.md; unset: the loss's")
    advantage_eps: float = key(
        1e-6, "added to the deviation or mean that an advantage is divided by", ge=0, lt=INF
    )
    aggregation: Literal["token", "sequence", "sum", "constant"] | None = key(
        None,
        "mean over tokens, over sequence means, over sequence sums, or over a constant length; "
        "unset: the loss's",
    )
    clip_low: float | None = key(
        None, "the ratio is clipped below 1 - clip_low; unset: the loss's own", ge=0, lt=1
    )
    clip_high: float | None = key(
        None, "the ratio is clipped above 1 + clip_high; unset: the loss's own", ge=0, lt=INF
    )
    dual_clip: float | None = key(
        None,
        "where an advantage is negative, the ratio counts as at most this; unset: unbounded",
        gt=1,
        lt=INF,
    )
    kl_coef: float = key(
        0.0, "weight of the KL to the frozen starting model; 0: no reference", ge=0, lt=INF
    )
    entropy_coef: float = key(
        0.0, "weight of the entropy bonus, with its exact gradient; 0: none", ge=0, lt=INF
    )
    kl_in: Literal["loss", "reward"] = key(
        "loss",
        "the KL is added to the loss of each token, or, summed over a response, taken off its "
        "reward before advantages are made",
    )
    kl_estimator: Literal["k1", "k2", "k3"] | None = key(
        None, "estimator of that KL; unset: k3 in the loss, k1 in the reward"
    )
    importance: Literal["none", "tis", "mask"] = key(
        "none",
        "correct for a generator that is not exact: weigh losses by the clamped ratio of the "
        "trainer's probability to the generator's, or drop them where it is out of bounds",
    )
    importance_level: Literal["token", "sequence"] = key(
        "token", "that ratio is a token's, or the product over a whole response"
    )
    importance_low: float | None = key(
        None,
        "its lower bound; unset: 0 with importance=tis, 1 / importance_high with mask",
        ge=0,
        le=1,
    )
    importance_high: float = key(2.0, "its upper bound", ge=1, lt=INF)
    length_penalty: float = key(
        0.0,
        "taken off the reward of a response of length_penalty_limit tokens, and less of one up to "
        "length_penalty_tokens shorter (DAPO's soft overlong punishment); 0: nothing",
        ge=0,
        le=1e100,
    )
    length_penalty_tokens: int | None = key(
        None, "length of that ramp; needed with length_penalty [tokens]", ge=1
    )
    length_penalty_limit: int | None = key(
        None, "its end; unset: generator.max_new_tokens [tokens]", ge=1
    )
    drop_equal_groups: bool = key(
        False, "leave groups of equal rewards (up to rounding) out of the loss and its divisor"
    )
    truncated: Literal["score", "mask"] = key(
        "score",
        "responses cut at generator.max_new_tokens: score them, or mask them out of the loss",
    )
    truncated_reward: float | None = key(
        None, "reward of truncated responses in training; unset: their score", ge=-1e100, le=1e100
    )
    truncated_logprobs: bool = key(
        False,
        "with generator.top_k or generator.top_p: logprobs of the truncated distribution, in "
        "training too; needs batch_invariant",
    )
    batch_invariant: bool = key(
        False,
        "batch-invariant kernels: equal bits on both sides, whatever the batch and the layout",
    )
    ema: float = key(
        0.0,
        "exponential average of the weights, which is evaluated and exported: its decay at an "
        "update, e.g. 0.99; 0: none",
        ge=0,
        lt=1,
    )
    check: Literal["strict"] | None = key(
        None,
        "strict: end at the first token whose trainer and generator logprobs differ, and name the "
        "module; all ranks wait for each other after every wave",
    )
    on_nonfinite: Literal["stop", "skip"] = key(
        "stop",
        "a loss, gradient or logprob that is not finite ends the run; skip: it continues without "
        "that step's update",
    )
    invariant: InvariantConf = field(default_factory=InvariantConf)
    mesh: MeshConf = field(default_factory=MeshConf)
    model: ModelConf = field(default_factory=ModelConf)
    teacher: TeacherConf = field(default_factory=TeacherConf)
    prompt: PromptConf = field(default_factory=PromptConf)
    difficulty: DifficultyConf = field(default_factory=DifficultyConf)
    trainer: TrainerConf = field(default_factory=TrainerConf)
    generator: GeneratorConf = field(default_factory=GeneratorConf)
    conversation: ConversationConf = field(default_factory=ConversationConf)
    reward: RewardConf = field(default_factory=RewardConf)
    vllm: VllmConf = field(default_factory=VllmConf)
    sync: SyncConf = field(default_factory=SyncConf)
    eval: EvalConf = field(default_factory=EvalConf)
    stop: StopConf = field(default_factory=StopConf)
    generate: GenerateConf = field(default_factory=GenerateConf)
    sft: SFTConf = field(default_factory=SFTConf)
    validate: ValidateConf = field(default_factory=ValidateConf)
    checkpoint: CheckpointConf = field(default_factory=CheckpointConf)
    export: ExportConf = field(default_factory=ExportConf)
    log: LogConf = field(default_factory=LogConf)
    profile: ProfileConf = field(default_factory=ProfileConf)


PACKAGE = Path(__file__).resolve().parents[1]
PACKAGE_DATA = PACKAGE / "data"
# inside an installed package, beside it in a checkout
CONF_DIR = next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir())


def resolve_path(path: str) -> Path:
    """`package:NAME` is the data directory NAME shipped inside the package; `~` is the home."""
    if path.startswith("package:"):
        return PACKAGE_DATA / path.removeprefix("package:")
    return Path(path).expanduser()
