"""Four gloo ranks that load, score, train and export one model in one layout after another.

Arguments: a directory with the checkpoints that TRAINERS names, and `even`. Each rank writes what
it saw of every case to `RANK.pt` there, and every trainer layout its export to `exports/CASE`.
`even` is also scored batch-invariant, by sequence-parallel ranks and without tp, to be compared bit
for bit.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from forked import run_ranks
from tiny_qwen3 import CPU, MAX_LENGTH, Packed, load_role, packed, random_sequences

from mesh.config.schema import Conf, GeneratorConf, TrainerConf
from mesh.engine.native.engine import EngineSettings, NativeEngine
from mesh.invariant.switch import batch_invariant
from mesh.layout.holdings import local_tensors
from mesh.layout.meshes import Meshes, build_meshes, plan_layout
from mesh.model.exported import planned_export, source_entries
from mesh.model.families import shape_of_directory
from mesh.model.hf import export
from mesh.model.layers import RMSNorm
from mesh.model.policy import Policy
from mesh.rl.cutting import owner
from mesh.rl.losses import Loss, LossTokens, TokenLoss
from mesh.rl.objective import Objective
from mesh.rl.packing import Leaf, leaves
from mesh.rl.step import Pass, passes_of
from mesh.roles.optimizer import OptimizerSettings
from mesh.roles.trainer import Trainer
from mesh.roles.trainer_settings import Start, TrainerSettings
from mesh.types import Request, Rollout, Sampling

TRAINERS = {  # case: (checkpoint, dp_replicate, dp_shard, tp, sequence_parallel)
    "fsdp4": ("tied", 1, 4, 1),
    "ddp4": ("tied", 4, 1, 1),
    "hsdp": ("tied", 2, 2, 1),
    "fsdp2_tp2": ("tied", 1, 2, 2),
    "ddp2_tp2": ("tied", 2, 1, 2),
    "tp4": ("tied", 1, 1, 4),
    "untied_fsdp4": ("untied", 1, 4, 1),
    "untied_fsdp2_tp2": ("untied", 1, 2, 2),
    "fsdp2_sp2": ("tied", 1, 2, 2, True),
    "untied_sp4": ("untied", 1, 1, 4, True),
    "biased_fsdp4": ("biased", 1, 4, 1),
    "biased_fsdp2_sp2": ("biased", 1, 2, 2, True),
    "biased_tp4": ("biased", 1, 1, 4),
    # fewer kv heads than ranks
    "kv1_fsdp2_tp2": ("kv1", 1, 2, 2),
    "kv1_tp4": ("kv1", 1, 1, 4),
    "kv1_ddp2_sp2": ("kv1", 2, 1, 2, True),
    "kv2_tp4": ("kv2", 1, 1, 4),
}
DTYPES = (torch.float32, torch.bfloat16)
SHARDED_ROWS = {37: [21, 2, 13, 1], 3: [2, 1], 1: [1]}  # none divides by 2 or 4
RECOMPUTED = ("full", "selective")
ENGINES = {  # case: (checkpoint, tp)
    "engine_tp1": ("tied", 1),
    "engine_tp2": ("tied", 2),
    "engine_tp4": ("tied", 4),
    "kv2_engine_tp1": ("kv2", 1),
    "kv2_engine_tp4": ("kv2", 4),
}
SAMPLINGS = {
    "greedy": Sampling(temperature=0.0, max_new_tokens=8, seed=0, step=0),
    "sampled": Sampling(temperature=1.2, max_new_tokens=8, seed=1, step=4, stop_tokens=(7,)),
    "truncated": Sampling(
        temperature=1.0, max_new_tokens=8, seed=2, step=0, top_k=9, top_p=0.9
    ),
}  # fmt: skip
SEQUENCES = random_sequences([21, 2, 13, 30], seed=1)
TEMPERATURE, NORMALISER, CLIP, LR, EPS, SEED = 0.8, 17.0, 0.05, 1e-2, 1e-2, 12
BETAS, PASS_TOKENS = (0.9, 0.95), 40


def rollouts() -> list[Rollout]:
    """Two answers to each of seven prompts, so that four ranks have different numbers of them."""
    made = []
    for prompt_id in range(7):
        for sample_id in range(2):
            sizes = [3 + prompt_id, 1 + (5 * prompt_id + 3 * sample_id) % 9]
            prompt, answer = random_sequences(sizes, seed=10 * prompt_id + sample_id)
            logprobs = (-1.0,) * len(answer)
            ids = (prompt_id, sample_id)
            made.append(Rollout(*ids, tuple(prompt), tuple(answer), logprobs, 0.0, "stop"))
    return made


def all_leaves() -> list[Leaf]:
    made = rollouts()
    advantages_R = torch.linspace(-1.5, 1.0, len(made))
    weights_R = torch.tensor([1.0 / len(r.tokens) for r in made])
    return leaves(made, advantages_R, weights_R)


def reinforce(tokens: LossTokens) -> TokenLoss:
    """-advantage * logprob, which nothing clips."""
    clipped_T = torch.zeros_like(tokens.logprobs_T, dtype=torch.bool)
    return TokenLoss(-tokens.logprobs_T * tokens.advantages_T, clipped_T)


def requests() -> list[Request]:
    prompts = random_sequences([1, 20, 7, 33], seed=3)
    return [Request(i, tuple(prompt), 2) for i, prompt in enumerate(prompts)]


def meshes_of(replicate: int, shard: int, tp: int) -> Meshes:
    trainer = TrainerConf(dp_replicate=replicate, dp_shard=shard, tp=tp)
    conf = Conf(trainer=trainer, generator=GeneratorConf(tp=tp))
    return build_meshes(plan_layout(conf, 4), "cpu")


def settings_of(path: Path, start: Path | None = None) -> TrainerSettings:
    """A trainer of the checkpoint in `path`; start: whose weights it has, random ones if None."""
    return TrainerSettings(
        shape=shape_of_directory(path),
        max_length=MAX_LENGTH,
        dtype=torch.float32,
        start=Start(start, SEED),
        temperature=TEMPERATURE,
    )


def my_passes(trainer: Trainer) -> list[Pass]:
    """This rank's forward passes over its leaves."""
    by_rank: list[list[Leaf]] = [[] for _ in range(trainer.dp)]
    for leaf in all_leaves():
        by_rank[owner(leaf.prompt_id, trainer.dp)].append(leaf)
    counts = [[leaf.num_tokens for leaf in mine] for mine in by_rank]
    assert trainer.dp_rank is not None
    return passes_of(by_rank[trainer.dp_rank], counts, trainer.dp_rank, PASS_TOKENS)


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().full_tensor().clone() for name, tensor in tensors.items()}


def train(root: Path, case: str) -> dict:
    """Everything a trainer says of one layout. All ranks call it alike."""
    checkpoint, replicate, shard, tp, *sequence_parallel = TRAINERS[case]
    meshes, path = meshes_of(replicate, shard, tp), root / checkpoint
    random = replace(settings_of(path), sequence_parallel=bool(sequence_parallel))
    adamw = OptimizerSettings(LR, BETAS, EPS, weight_decay=0.0, warmup_steps=0, clip_norm=CLIP)
    trainer = Trainer(replace(random, start=Start(path, 0), optimizer=adamw), meshes, CPU)
    seen: dict = {"loaded": whole(trainer.parameters())}
    write = dist.get_rank() == 0
    shape = random.shape
    # the tokenizer's directory has no files of one
    plan = planned_export(source_entries(path), (1,), torch.float32, root)
    export(root / "exports" / case, trainer.parameters(), shape, plan, write)
    with torch.no_grad():
        seen["scores"] = tuple(packed(SEQUENCES).scores(trainer.model, TEMPERATURE))
    passes, objective = my_passes(trainer), Objective(Loss(reinforce))
    trainer.accumulate(passes, objective, trainer.score(passes, objective.needs))
    seen["gradients"] = whole({n: p.grad for n, p in trainer.parameters().items()})
    seen["metrics"] = trainer.update(NORMALISER, sum(len(r.tokens) for r in rollouts()))
    seen["updated"] = whole(trainer.parameters())
    return seen | {"random": whole(Trainer(random, meshes, CPU).parameters())}


def generate(root: Path, checkpoint: str, tp: int) -> dict:
    """Completions of every sampling, and this rank's elements of the weights."""
    mesh = meshes_of(1, 4 // tp, tp).generator_mesh
    model, shape = load_role(root / checkpoint, mesh, dist.get_rank())
    settings = EngineSettings(MAX_LENGTH, 6, 68, 4, 16, prefix_cache=True, cuda_graphs=False)
    engine = NativeEngine(model, shape, settings, mesh.get_group("tp") if tp > 1 else None)
    engine.reset(version=0)
    seen: dict = {name: engine.generate(requests(), s) for name, s in SAMPLINGS.items()}
    sizes = {name: x.numel() for name, x in local_tensors(engine.weights()).items()}
    return seen | {"sizes": sizes, "preemptions": engine.preemptions}


def row_of(num_tokens: int) -> Packed:
    """A packed row that is scored at every one of its tokens."""
    row = packed(random_sequences(SHARDED_ROWS[num_tokens], seed=5))
    targets = torch.tensor(random_sequences([num_tokens], seed=6)[0])
    return replace(row, index_A=torch.arange(num_tokens), targets_A=targets)


def row_gradients(trainer: Trainer, num_tokens: int) -> dict[str, torch.Tensor]:
    """Gradients of a weighted sum of a row's logprobs; every dp rank has the same row."""
    trainer.model.zero_grad()
    logprobs_A, _ = row_of(num_tokens).scores(trainer.model, TEMPERATURE)
    (logprobs_A * torch.linspace(-1.5, 1.0, num_tokens)).sum().backward()
    gradients = whole({n: p.grad for n, p in trainer.parameters().items()})
    return {name: gradient / trainer.dp for name, gradient in gradients.items()}


def normed_rows(model: Policy) -> dict[str, list[int]]:
    """Tokens that every norm of the residual stream sees, call after call, by its name."""
    seen: dict[str, list[int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            count = seen.setdefault(name, []).append
            module.register_forward_hook(
                lambda _, inputs, __, count=count: count(len(inputs[0][0]))
            )
    return seen


def sharded_rows(root: Path, tp: int, recomputed: tuple[str, ...] = ()) -> dict:
    """Every row scored on 4 / tp FSDP shards, sequence-parallel where there is a tp.

    logprobs by (enabled, dtype, tokens), batch-invariant or not; batch-invariant fp32 gradients by
    tokens, and those of the longest row by the kind of recomputation; rows that norms see.
    """
    meshes, path = meshes_of(1, 4 // tp, tp), root / "even"
    settings = replace(settings_of(path, path), sequence_parallel=tp > 1)
    logprobs, gradients = {}, {}

    def trainer_of(dtype: torch.dtype, recompute: str = "none") -> Trainer:
        changed = replace(settings, dtype=dtype, activation_checkpointing=recompute)
        return Trainer(changed, meshes, CPU)

    for enabled, dtype in product((True, False), DTYPES):
        with batch_invariant(enabled, "cpu"):
            trainer = trainer_of(dtype)
            for num_tokens in SHARDED_ROWS:
                with torch.no_grad():
                    scores = row_of(num_tokens).scores(trainer.model, TEMPERATURE)
                logprobs[enabled, dtype, num_tokens] = scores.logprobs_A
                if enabled and dtype == torch.float32:
                    gradients[num_tokens] = row_gradients(trainer, num_tokens)
            if not enabled:
                rows = normed_rows(trainer.model)
                row_of(37).scores(trainer.model, TEMPERATURE)
    with batch_invariant(True, "cpu"):
        for recompute in recomputed:
            gradients[recompute] = row_gradients(trainer_of(torch.float32, recompute), 37)
    return {"logprobs": logprobs, "gradients": gradients, "normed_rows": rows}


def main() -> None:
    root = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    seen = {case: train(root, case) for case in TRAINERS}
    seen |= {case: generate(root, *engine) for case, engine in ENGINES.items()}
    seen |= {f"rows_tp{tp}": sharded_rows(root, tp) for tp in (1, 4)}
    seen["rows_tp2"] = sharded_rows(root, 2, RECOMPUTED)
    torch.save(seen, root / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    run_ranks(4, main)
