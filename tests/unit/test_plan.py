"""The plan: a configuration resolved once, and the evaluation sets that it can hold."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models

from mesh.config.loading import load_conf
from mesh.config.schema import Conf
from mesh.engine.kinds import NATIVE, VLLM_NATIVE, VLLM_TITAN
from mesh.lifecycle.process import Process
from mesh.model.families import TINY
from mesh.program.assembly import assemble, check, sync
from mesh.program.plan import Device, Found, Plan, resolve
from mesh.program.warnings import start_warnings
from mesh.recipes.grpo import held_out
from mesh.recipes.validate import uneven_plan
from mesh.rl.loading import load_loss
from mesh.rl.samples import fixed_prompts
from mesh.roles.evaluation import EvaluationSet
from mesh.roles.optimizer import OptimizerSettings
from mesh.roles.trainer_settings import Start
from mesh.tasks import TaskSpec, draw_held_out, load_task
from mesh.tasks.calls import ScoringSettings, TaskSource
from mesh.tasks.spell_backward import SpellBackward
from mesh.text.tokenizer import CHARACTERS, load_tokenizer
from mesh.types import Distribution, Prompt

ENGINES = {
    NATIVE: ["engine=native"],
    VLLM_TITAN: ["engine=vllm"],
    VLLM_NATIVE: ["engine=vllm", "vllm.model=native"],
}


@dataclass(frozen=True)
class AllRight(SpellBackward):
    """Every response to its own questions is right."""

    def eval_prompts(self, num: int) -> list[Prompt]:
        return [Prompt(i, f"{i}abc>", "mine") for i in range(num)]

    def score(self, prompt: Prompt, response: str) -> float:
        assert prompt.answer == "mine", "a prompt of another set"
        return 1.0


def conf_of(*words: str) -> Conf:
    return load_conf(["conf=qwen3_tiny", "log.tensorboard=false", *words])[1]


def planned(
    *words: str,
    world_size: int = 1,
    device: Device = "cpu",
    training: bool = True,
    tokenizer: Path = CHARACTERS,
) -> Plan:
    """The plan of a configuration, whatever is installed on this machine."""
    conf = conf_of(*words)
    task = load_task(conf.task, conf.seed, conf.task_args)
    held_out = draw_held_out(task, conf.eval.num_prompts)
    found = Found(TINY, load_tokenizer(tokenizer), task, load_loss(conf.loss), held_out)
    return resolve(conf, found, world_size, device, training)


@pytest.mark.parametrize("kind", ENGINES, ids=str)
def test_an_engine_has_its_pages_and_digests(kind):
    """Compared after every sync, unless the weights are the trainer's own on a GPU."""
    pages = {NATIVE: (16, 256), VLLM_TITAN: (16, 256), VLLM_NATIVE: (32, 16)}
    every = {NATIVE: ("every", "first"), VLLM_TITAN: ("every",) * 2, VLLM_NATIVE: ("every",) * 2}
    plans = [planned(*ENGINES[kind], device=device) for device in ("cpu", "cuda")]
    assert [plan.generator.kind for plan in plans] == [kind, kind]
    assert tuple(plan.generator.engine.page_size for plan in plans) == pages[kind]
    assert tuple(plan.verify for plan in plans) == every[kind]
    assert [plan.generator.engine.releases for plan in plans] == [False, kind is not NATIVE]
    for word in ("off", "first"):
        assert planned(*ENGINES[kind], f"sync.verify={word}").verify == word


def test_dtypes_that_are_left_open_are_the_device_s():
    words = ["trainer.dtype=float32", "generator.dtype=bfloat16"]
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        plan = planned(device=device)
        assert (plan.device, plan.trainer.dtype, plan.generator.dtype) == (device, dtype, dtype)
        plan = planned(*words, device=device)
        assert plan.trainer.dtype == torch.float32 and plan.generator.dtype == torch.bfloat16


def test_every_part_has_the_keys_that_it_uses():
    words = [
        "mesh.mode=split", "trainer.tp=2", "trainer.lr=1e-4", "trainer.warmup_steps=3", "seed=7",
        "trainer.clip_norm=0.5", "trainer.sequence_parallel=true", "on_nonfinite=skip",
        "trainer.activation_checkpointing=full", "trainer.microbatch_tokens=99", "num_prompts=12",
        "group_size=4", "waves=3", "drop_equal_groups=true", "generator.temperature=0.5",
        "generator.top_k=5", "generator.top_p=0.9", "model.max_length=30", "loss=dr_grpo",
        "generator.max_new_tokens=6", "clip_high=0.3", "kl_coef=0.1", "eval.num_prompts=5",
        "eval.num_samples=2", "sync.bucket_mb=3", "timeout_seconds=60", "check=strict",
        "batch_invariant=true", "invariant.chunks=2", "task_args.max_length=4", "overlong=skip",
        "truncated=mask", "truncated_reward=-2", "log.samples=6",
    ]  # fmt: skip
    plan, shape = planned(*words, world_size=4), replace(TINY, textless=((98, 128),))
    assert (plan.layout.trainer.shape, plan.layout.generator.size) == ((1, 1, 2), 2)
    trainer, generator, step = plan.trainer, plan.generator, plan.step
    assert trainer.optimizer == OptimizerSettings(1e-4, (0.9, 0.99), 1e-8, 0.0, 3, 0.5, steps=150)
    assert "reference" in trainer.frozen and trainer.sequence_parallel
    assert (trainer.activation_checkpointing, trainer.on_nonfinite) == ("full", "skip")
    assert (trainer.temperature, trainer.max_length, plan.shape) == (0.5, 30, shape)
    assert generator.shape == shape
    assert (generator.temperature, generator.top_k, generator.top_p) == (0.5, 5, 0.9)
    assert (generator.seed, generator.max_new_tokens, generator.timeout_seconds) == (7, 6, 60)
    assert generator.stop_tokens == plan.tokenizer.eos_ids and generator.engine.max_length == 30
    assert (step.num_prompts, step.group_size, step.waves) == (12, 4, 3)
    assert (step.pass_tokens, step.drop_equal_groups) == (99, True)
    assert (step.mask_truncated, step.truncated_reward) == (True, -2.0)
    assert plan.objective.settings == {"clip_high": 0.3} and plan.objective.kl_coef == 0.1
    assert (plan.objective.loss, plan.objective.longest_response) == (load_loss("dr_grpo"), 6)
    assert (plan.bucket_bytes, plan.timeout_seconds) == (3 << 20, 60)
    assert (plan.chunks, plan.strict) == (2, True)
    assert plan.training == TaskSource(
        load_task("spell_backward", 7, {"max_length": 4}),
        TaskSpec("spell_backward", 7, {"max_length": "4"}),
        ScoringSettings(0, 60.0, "stop"),
    )
    held_out = tuple(plan.task.eval_prompts(5))
    kept = fixed_prompts(num_prompts=5, num_samples=2, most=6, seed=7)
    assert len(kept) == 3
    assert plan.evaluations == {"": EvaluationSet(plan.training, held_out, 2, (1, 2), kept=kept)}
    assert (plan.prompts.task, plan.prompts.overlong) == (plan.task, "skip")
    assert (plan.prompts.max_length, plan.prompts.max_new_tokens) == (30, 6)


def test_the_defaults_leave_out_what_is_not_asked_for():
    plan = planned()
    assert (plan.chunks, plan.strict, plan.trainer.frozen) == (None, False, {})
    assert (plan.step.mask_truncated, plan.step.truncated_reward) == (False, None)
    assert plan.trainer.start.path is not None and plan.trainer.start.path.name == "qwen3_tiny"
    random = planned("model.init=random", "seed=5")
    assert random.trainer.start == Start(None, 5)
    assert random.export.tokenizer == plan.export.tokenizer == plan.trainer.start.path
    assert planned("model.path=null", "model.init=random").export.tokenizer == CHARACTERS


def test_a_program_that_only_generates_has_neither_optimizer_nor_reference():
    plan = planned("kl_coef=0.1", training=False)
    assert plan.trainer.optimizer is None and not plan.trainer.frozen
    assert "reference" in planned("kl_coef=0.1").trainer.frozen


def parts_of(value: Any) -> list[Any]:
    """A dataclass and all dataclasses below it."""
    parts = [getattr(value, field.name) for field in fields(value)]
    return [value, *(p for part in parts if is_dataclass(part) for p in parts_of(part))]


def test_a_plan_is_frozen_and_holds_no_configuration():
    plan = planned()
    assert len(parts_of(plan)) > 10
    for part in parts_of(plan):
        assert type(part).__module__ != Conf.__module__, type(part)
        with pytest.raises(FrozenInstanceError):
            setattr(part, fields(part)[0].name, None)


def test_both_roles_know_the_ids_for_which_the_tokenizer_has_no_token(tmp_path):
    """The tokenizer of model.tokenizer, where it is not the model's own."""
    assert planned().trainer.shape.textless == planned().generator.shape.textless == ((98, 128),)
    backend = Backend(models.WordLevel({"a": 2, "</s>": 90}, "a"))
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    plan = planned(tokenizer=tmp_path)
    assert plan.trainer.shape == plan.generator.shape
    assert plan.shape.textless == ((0, 2), (3, 90), (91, 128))


def test_a_checked_plan_is_the_resolved_one(process: Process):
    """`check` reads the model, the task and the loss that a configuration names."""
    plan = check(conf_of("loss=dr_grpo"), process)
    expected = planned("loss=dr_grpo")
    prompts = replace(plan.prompts, encoder=expected.encoder)
    assert replace(plan, tokenizer=expected.tokenizer, prompts=prompts) == expected


def test_a_validation_compares_the_tokens_of_truncated_responses_too(process: Process):
    conf = conf_of("truncated=mask", "truncated_reward=-1")
    assert check(conf, process).step.mask_truncated
    step = uneven_plan(conf, process).step
    assert (step.mask_truncated, step.truncated_reward) == (False, None)


def test_a_validation_has_no_importance_weights(process: Process):
    """With equal bits they are refused as weights of 1."""
    conf = conf_of("importance=mask", "importance_level=sequence", "importance_high=3")
    assert check(conf, process).objective.importance is not None
    plan = uneven_plan(replace(conf, batch_invariant=True), process)
    assert plan.objective.importance is None


def test_evaluation_sets_are_measured_by_name(process: Process):
    """Two beside the task's own: one of another task, one of the same with its own scorer."""
    words = ["eval.num_prompts=4", "eval.num_samples=2", "generator.max_new_tokens=4"]
    plan = check(conf_of(*words), process)
    right = TaskSource(
        AllRight(0), TaskSpec(f"{__name__}:AllRight", 0), ScoringSettings(0, 1.0, "zero")
    )
    own = plan.evaluations[""]
    other = EvaluationSet(right, tuple(right.task.eval_prompts(3)), 3, (1, 3))
    sets = {"": own, "right": other, "same": replace(own, num_samples=1, ks=(1,))}
    program = assemble(replace(plan, evaluations=sets), process)
    assert program.evaluation_scorers[""] is program.scorer
    assert program.evaluation_scorers["same"] is program.scorer
    assert program.evaluation_scorers["right"] is not program.scorer
    sync(program)
    metrics = held_out(program, process).metrics
    rest = ["accuracy_greedy", "reward", "response_length/mean", "response/truncated"]
    own_names = ["accuracy", "pass@1", "pass@2", "majority@2", *rest]
    assert list(metrics) == [
        *(f"eval/{name}" for name in own_names),
        *(f"eval/right/{name}" for name in ("accuracy", "pass@1", "pass@3", "majority@3", *rest)),
        "eval/right/failed",
        *(f"eval/same/{name}" for name in ("accuracy", "pass@1", *rest)),
    ]
    assert [metrics[f"eval/right/{x}"] for x in ("accuracy_greedy", "reward")] == [1.0, 1.0]
    assert metrics["eval/right/failed"] == 0.0
    assert metrics["eval/same/accuracy_greedy"] == metrics["eval/accuracy_greedy"] < 1.0
    alone = assemble(plan, process)
    sync(alone)
    assert held_out(alone, process).metrics == {
        name: metrics[name] for name in list(metrics)[: len(own_names)]
    }


@pytest.mark.parametrize(
    ("words", "named", "remedy"),
    [
        (["generator.top_k=5"], "generator.top_k=5: ", "set generator.top_k=0"),
        (["generator.top_p=0.9"], "generator.top_p=0.9: ", "set generator.top_p=1"),
        (
            ["generator.top_k=127", "generator.top_p=0.5"],
            "generator.top_k=127 generator.top_p=0.5: ",
            "set generator.top_k=0 generator.top_p=1",
        ),
    ],
    ids=["top_k", "top_p", "both"],
)
def test_truncated_sampling_is_warned_about_with_the_remedy(words, named, remedy):
    (line,) = start_warnings(planned(*words))
    assert line.startswith(f"warning: {named}tokens are drawn from the truncated distribution")
    other = "batch_invariant=true truncated_logprobs=true"
    assert "the policy gradient is biased" in line and line.endswith(f"{remedy}, or {other}")
    assert start_warnings(planned(*remedy.split()[1:])) == []
    unbiased = planned(*words, *other.split())
    assert start_warnings(unbiased) == []
    kept = unbiased.generator
    assert unbiased.trainer.distribution == Distribution(1.0, kept.top_k, kept.top_p)
    assert planned(*words).trainer.distribution == Distribution(1.0)


@pytest.mark.parametrize("loss", ["gspo", "rloo"])
def test_a_ratio_of_sequences_that_rounding_may_clip_is_warned_about(loss):
    rounded = [f"loss={loss}", "trainer.dtype=bfloat16", "generator.dtype=bfloat16"]
    (line,) = start_warnings(planned(*rounded))
    assert line.startswith("warning: the ratio of this loss is that of whole sequences")
    for word in ("batch_invariant=true", "importance=tis", "updates_per_step=2", "loss=grpo"):
        assert start_warnings(planned(*rounded, word)) == []
    assert start_warnings(planned(f"loss={loss}")) == [], "float32 is near enough"


def test_sampling_that_truncates_nothing_is_not_warned_about():
    """The defaults, and as many tokens as the vocabulary has."""
    assert start_warnings(planned()) == start_warnings(planned("generator.top_k=128")) == []
