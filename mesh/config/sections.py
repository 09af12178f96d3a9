"""The sections of the configuration: `trainer.*`, `generator.*` and so on, each a dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mesh.config.declare import INF, key


@dataclass(frozen=True)
class InvariantConf:
    chunks: int = key(4, "largest tensor-parallel degree that the self-test covers", ge=1)


@dataclass(frozen=True)
class MeshConf:
    mode: Literal["colocated", "split"] = key(
        "colocated", "trainer and generator on the same ranks, or on disjoint ones"
    )


@dataclass(frozen=True)
class ModelConf:
    path: str | None = key(None, "Hugging Face model directory, or package:NAME for a shipped one")
    flavor: str = key(
        "0.6B", "Qwen3 size where no model.path gives one: tiny, 0.6B, 1.7B, 4B, 8B, ..."
    )
    init: Literal["checkpoint", "random"] = key(
        "checkpoint", "start from the weights in model.path, or from random ones"
    )
    tokenizer: str | None = key(
        None, "directory with tokenizer.json; unset: model.path, else the shipped characters"
    )
    ignore_config: list[str] = key(
        [], "entries of model.path's config.json that are read as if they were not there"
    )
    ignore_tensors: list[str] = key(
        [], "tensors in model.path that are left out: names, or patterns like score.*"
    )
    max_length: int = key(
        2048, "context: prompt and response together never exceed it [tokens]", ge=2
    )


@dataclass(frozen=True)
class GeneratorConf:
    dp: int | None = key(None, "data-parallel engines; unset: fills the submesh", ge=1)
    tp: int = key(1, "tensor-parallel degree", ge=1)
    dtype: Literal["float32", "bfloat16"] | None = key(
        None, "dtype of weights, activations and KV cache; unset: bfloat16 on CUDA, float32 on CPU"
    )
    temperature: float = key(1.0, "sampling temperature of the rollouts", gt=0, lt=INF)
    top_k: int = key(0, "sample from the k most likely tokens; 0: from all", ge=0)
    top_p: float = key(
        1.0, "nucleus: sample from the smallest set with this probability; 1: from all", gt=0, le=1
    )
    stop: list[str] = key(
        [], "texts that end a response, beside the model's end tokens, e.g. [</calc>]"
    )
    max_new_tokens: int = key(
        256, "max response length; in a conversation that of a turn [tokens]", ge=1
    )
    max_sequences: int = key(256, "max sequences decoded at once, per engine", ge=1)
    kv_tokens: int = key(
        0,
        "KV cache of one engine [tokens]; 0: max_sequences full responses, on a GPU with prompts "
        "of 256 tokens",
        ge=0,
    )
    page_size: int = key(
        0, "tokens per KV page; 0: 256 on CUDA (required by its kernel), 16 on CPU", ge=0
    )
    prefill_tokens: int = key(8192, "max prompt tokens per forward pass [tokens]", ge=1)
    prefix_cache: bool = key(True, "samples of one prompt share the prompt's KV")
    cuda_graphs: bool = key(True, "replay decode steps as CUDA graphs (CUDA only)")


@dataclass(frozen=True)
class VllmConf:
    model: Literal["titan", "native"] = key(
        "titan", "the model that vLLM runs: the trainer's, which can be exact, or vLLM's own"
    )
    release: bool = key(True, "colocated on a GPU: free vLLM's KV cache while the trainer trains")


@dataclass(frozen=True)
class SyncConf:
    verify: Literal["every", "first", "off"] | None = key(
        None,
        "compare weight digests after a sync; unset: first with engine=native on CUDA, else every",
    )
    bucket_mb: int = key(256, "max size of a point-to-point message [MiB]", ge=1)


@dataclass(frozen=True)
class EvalConf:
    every: int = key(10, "steps between evaluations; 0: only after the last step", ge=0)
    num_prompts: int | None = key(
        None, "held-out prompts; unset: 256, or as many as a data set holds out, if fewer", ge=1
    )
    num_samples: int = key(4, "samples per held-out prompt", ge=1)
    k: list[int] = key(
        [], "the k of pass@k and majority@k, e.g. [1, 4]; unset: 1 and eval.num_samples", ge=1
    )
    greedy: bool = key(True, "answer every held-out prompt greedily, too (eval/accuracy_greedy)")
    sets: dict[str, Any] = key(
        {}, "other sets that are evaluated, each with the keys of eval.sets.NAME"
    )
    output: str | None = key(None, "file to which recipes/evaluate.py writes its metrics as JSON")
    results: str | None = key(
        None, "JSON Lines file to which recipes/evaluate.py writes every held-out prompt's results"
    )


@dataclass(frozen=True)
class StopConf:
    metric: str = key(
        "eval/accuracy", "the metric of evaluations that stop.above and stop.after follow"
    )
    above: float | None = key(None, "end the run where it is at least this", gt=-INF, lt=INF)
    after: int | None = key(
        None, "end the run after so many evaluations in which it has not exceeded its best", ge=1
    )


@dataclass(frozen=True)
class GenerateConf:
    prompts: list[str] = key(
        [], "prompts for recipes/generate.py; -: lines of stdin; unset: held-out prompts"
    )
    file: str | None = key(
        None, "file with prompts instead: JSON Lines (prompt, messages or tokens), or plain lines"
    )
    output: str | None = key(None, "JSON Lines file to which the answers are written, too")
    num_samples: int = key(1, "answers per prompt", ge=1)
    greedy: bool = key(True, "greedy decoding; false: sample as in training")


@dataclass(frozen=True)
class SFTConf:
    steps: int = key(75, "supervised steps", ge=1)
    epochs: int | None = key(
        None, "in place of sft.steps: passes over everything that the task's all_prompts has", ge=1
    )
    batch_size: int = key(128, "examples per step", ge=1)
    lr: float = key(
        1e-3, "peak learning rate; trainer.warmup_steps and trainer.decay hold", gt=0, lt=INF
    )
    output: str | None = key(None, "directory for the model; unset: RUN_DIR/model")


@dataclass(frozen=True)
class ValidateConf:
    steps: int = key(3, "training steps that recipes/validate.py compares", ge=1)
    sequences: int = key(257, "sequences of the batch that every rung generates", ge=2)
    layouts: Literal["all", "cover", "own"] = key(
        "cover",
        "L3: all pairs of layouts, each layout of a role at least once, or only the run's own",
    )
    control: bool = key(
        False, "repeat with ordinary kernels, as a control that differences are detected"
    )


@dataclass(frozen=True)
class CheckpointConf:
    every: int = key(
        0,
        "steps between checkpoints, and one after the last; 0: only where a run stops or fails",
        ge=0,
    )
    keep: int = key(2, "number of complete checkpoints to keep, the newest", ge=1)
    best: bool = key(
        True, "with checkpoint.every: keep the model of the best evaluation in RUN_DIR/best"
    )
    best_metric: str = key(
        "eval/accuracy",
        "the metric of an evaluation that checkpoint.best follows, e.g. eval/reward, eval/pass@4 "
        "or eval/NAME/accuracy; the largest value is the best, with a minus in front of the name "
        "the smallest",
    )


@dataclass(frozen=True)
class ExportConf:
    dtype: Literal["float32", "bfloat16"] | None = key(
        None,
        "dtype of the weights in exported models; unset: bfloat16 if all those in model.path are, "
        "else float32",
    )


@dataclass(frozen=True)
class ProfileConf:
    steps: list[int] = key(
        [],
        "steps to profile, e.g. [3]: RUN_DIR/profiles/step-N-rank-R.json.gz is a trace for "
        "ui.perfetto.dev, step-N-rank-R.txt a table of what took the time",
        ge=1,
    )
    rank: int = key(0, "the rank that is profiled", ge=0)


@dataclass(frozen=True)
class LogConf:
    progress: bool = key(True, "live progress display on a terminal; plain lines elsewhere")
    tensorboard: bool = key(True, "write RUN_DIR/tensorboard")
    wandb: str | None = key(None, "Weights & Biases project to log to")
    trackio: str | None = key(None, "trackio project to log to, in files on this machine")
    samples: int = key(
        32,
        "most rollouts per step written to samples.jsonl.gz, in whole groups, and answers per "
        "evaluation of a set; -1: all, 0: none",
        ge=-1,
    )
    samples_mb: float = key(
        100,
        "most bytes of samples.jsonl.gz [1e6]; a run that would need more keeps the rollouts of "
        "some steps only, at even distances to its end",
        gt=0,
    )
    tokens: bool = key(True, "samples.jsonl.gz has token ids, texts, logprobs and entropies too")
    timeline: bool = key(
        True, "write RUN_DIR/timeline.jsonl: when each rank began and ended the phases of a step"
    )
    evaluations: bool = key(
        False, "write every held-out prompt's results to RUN_DIR/evaluations/step-N.jsonl"
    )
