"""A teacher beside the policy: of another family and size, with a vocabulary padded otherwise; its
scores and gradients, and the directories that are refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_trainer import (
    CPU,
    accumulate,
    conf_of,
    num_tokens,
    objective_for,
    passes_in,
    some_leaves,
    some_rollouts,
)
from tiny_qwen3 import MAX_LENGTH, Variant, save_checkpoint

from mesh.config.schema import PACKAGE_DATA
from mesh.layout.holdings import local_tensors
from mesh.layout.meshes import build_meshes, plan_layout
from mesh.model.attention import packed_context
from mesh.model.families import TINY, shape_of_directory
from mesh.model.parallel import local
from mesh.model.policy import Policy, build_policy, named_weights
from mesh.program.plan import trainer_settings
from mesh.program.teacher import read_teacher, teacher_warnings
from mesh.rl.packing import Leaf, PackedBatch, leaves, pack
from mesh.roles.gradients import summed_gradients
from mesh.roles.trainer import Trainer
from mesh.roles.trainer_settings import Start
from mesh.text.tokenizer import CHARACTERS, load_tokenizer
from mesh.types import ModelShape

KNOWN = 98  # ids of the shipped tokenizer; the tiny model has 128
TEXTLESS = ((KNOWN, 128),)
POLICY = replace(TINY, textless=TEXTLESS)
VOCABULARIES = [100, 128, 160]


def teacher_in(path: Path, vocab_size: int, **others) -> Path:
    """A random Llama of another size, whose likeliest ids have no token."""
    variant = Variant(3, tied=False, vocab_size=vocab_size, family="llama", head_dim=16, **others)
    save_checkpoint(path, variant)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHARACTERS / name, path / name)
    return path


def trainer_with(teacher: Path, *words: str) -> tuple[Trainer, list[str]]:
    words = [f"teacher.path={teacher}", *words]
    conf = conf_of(*words)
    shape = read_teacher(conf, "cpu", POLICY, load_tokenizer(CHARACTERS))
    settings = trainer_settings(conf, POLICY, "cpu", objective_for(conf), shape)
    settings = replace(settings, start=Start(None, seed=3))
    return Trainer(settings, build_meshes(plan_layout(conf, 1), "cpu"), CPU), words


def unsharded(model: Policy, shape: ModelShape, mesh) -> Policy:
    """The same model without FSDP, for plain autograd."""
    copy = build_policy(shape, MAX_LENGTH, CPU, torch.float32, mesh)
    weights = local_tensors(named_weights(model))
    with torch.no_grad():
        for name, parameter in named_weights(copy).items():
            parameter.copy_(weights[name])
    return copy


def unrewarded() -> list[Leaf]:
    """Leaves without advantages, as loss=distill has them; every token weighs 0.5."""
    rollouts = some_rollouts()
    weights_R = torch.full((len(rollouts),), 0.5)
    return leaves(rollouts, torch.zeros(len(rollouts)), weights_R)


def trained_and_plain(teacher: Path, mesh, words: list[str], share: list[Leaf], plain_loss):
    """(metrics, gradients) of a trainer's step, and those of `plain_loss(policy, teacher, batch)`:
    both models without FSDP give the logprobs of all ids with a token."""
    trainer, words = trainer_with(teacher, *words)
    sides = [
        unsharded(trainer.model, POLICY, mesh),
        unsharded(trainer.teacher, trainer.settings.frozen["teacher"].shape, mesh),
    ]
    accumulate(trainer, passes_in(share), objective_for(conf_of(*words)))
    found = {name: g.clone() for name, g in summed_gradients(trainer.model).items()}
    plain_loss(*(plain(model, pack(share)) for model in sides), pack(share)).backward()
    for name, parameter in named_weights(sides[0]).items():
        if name in found:
            scale = parameter.grad.abs().max().item()
            assert scale > 0
            torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=1e-4 * scale)
    assert len(found) > 20
    return trainer.update(2.0, num_tokens(share))


def plain(model: Policy, batch: PackedBatch) -> torch.Tensor:
    """Logits of all ids with a token, by plain operators, float64 [A, KNOWN]."""
    context = packed_context(batch.cu_seqlens, batch.max_seqlen)
    hidden_TD = model.hidden(batch.tokens_T, batch.positions_T, context)
    logits = hidden_TD[batch.index_A] @ local(model.lm_head.weight).t()
    return logits[:, :KNOWN].double()


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("teachers")
    return {size: teacher_in(root / str(size), size) for size in VOCABULARIES}


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_a_teacher_has_transformers_scores_of_the_tokens_that_there_are(
    teachers, vocab_size, solo_mesh
):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(teachers[vocab_size]).eval()
    trainer, words = trainer_with(teachers[vocab_size], "loss=distill")
    assert trainer.teacher is not None and trainer.reference is None
    needs = objective_for(conf_of(*words)).needs
    (known,) = trainer.score(passes_in(some_leaves()), needs)
    expected = []
    for leaf in some_leaves():
        for r in leaf.rollouts:
            with torch.no_grad():
                logits = theirs(torch.tensor([[*r.prompt_tokens, *r.tokens]])).logits[0]
            rows = logits[len(r.prompt_tokens) - 1 : -1, :KNOWN].double().log_softmax(-1)
            expected.append(rows.gather(1, torch.tensor(r.tokens)[:, None])[:, 0])
    found = known.teacher_logprobs_A
    torch.testing.assert_close(found.double(), torch.cat(expected), rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_full_kl_trains_with_the_gradient_of_its_definition(teachers, temperature, solo_mesh):
    """Every weight's, with autograd through the plain logits in float64."""
    means = []

    def loss(ours, theirs, batch):
        p, q = ((x / temperature).log_softmax(-1) for x in (ours, theirs))
        divergence_A = (p.exp() * (p - q)).sum(-1)
        means.append(float(divergence_A.mean()))
        return (divergence_A * batch.weights_A).sum()

    words = ["loss=distill", "teacher.kl=full", f"generator.temperature={temperature}"]
    metrics = trained_and_plain(teachers[160], solo_mesh, words, unrewarded(), loss)
    assert metrics["teacher_kl"] == pytest.approx(means[0], rel=1e-4)
    # every token weighs 0.5, and the normaliser is 2
    tokens = num_tokens(unrewarded())
    assert metrics["loss"] == pytest.approx(means[0] * tokens * 0.5 / 2, rel=1e-4)
    assert metrics["clip_fraction"] == 0 and "kl" not in metrics


def test_the_sampled_kl_and_the_entropy_train_with_their_definitions(teachers, solo_mesh):
    measured = []

    def loss(ours, theirs, batch):
        all_AV, other_AV = ours.log_softmax(-1), theirs.detach().log_softmax(-1)
        logprobs_A, teacher_A = (
            x.gather(1, batch.targets_A[:, None])[:, 0] for x in (all_AV, other_AV)
        )
        difference_A = logprobs_A.detach() - teacher_A
        advantages_A = batch.advantages_A - 0.5 * difference_A
        ratio_A = (logprobs_A - batch.old_logprobs_A).exp()
        loss_A = -torch.minimum(ratio_A * advantages_A, ratio_A.clamp(0.8, 1.2) * advantages_A)
        entropy_A = -(all_AV.exp() * all_AV).sum(-1)
        measured.extend([float(difference_A.mean()), float(entropy_A.mean())])
        return ((loss_A - 0.25 * entropy_A) * batch.weights_A).sum()

    words = ["teacher.coef=0.5", "entropy_coef=0.25"]
    metrics = trained_and_plain(teachers[128], solo_mesh, words, some_leaves(), loss)
    found = [metrics["teacher_kl"], metrics["entropy"]]
    assert found == pytest.approx(measured, rel=1e-4)


def test_an_empty_pass_runs_beside_a_teacher(teachers, solo_mesh):
    trainer, words = trainer_with(teachers[128], "loss=distill", "teacher.kl=full")
    scores = accumulate(trainer, [[]], objective_for(conf_of(*words)))
    assert scores.logprobs_A.shape == (0,)
    assert trainer.update(1.0, 0)["teacher_kl"] == 0.0


def refused(path: Path, *words: str, device: str = "cpu") -> list[str]:
    conf = conf_of(f"teacher.path={path}", "teacher.coef=1", *words)
    with pytest.raises(ValueError) as caught:
        read_teacher(conf, device, POLICY, load_tokenizer(CHARACTERS))
    return [line.removeprefix(f"teacher.path={path}: ") for line in str(caught.value).splitlines()]


def edited(path: Path, name: str, change) -> None:
    entries = json.loads((path / name).read_text())
    change(entries)
    (path / name).write_text(json.dumps(entries))


@pytest.fixture
def copy(teachers, tmp_path) -> Path:
    return Path(shutil.copytree(teachers[128], tmp_path / "copy"))


def test_a_teacher_of_other_tokens_is_refused_with_the_first_of_them(copy):
    def swap(entries):
        vocab = entries["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    first = min(load_tokenizer(CHARACTERS).backend.token_to_id(x) for x in "ab")
    edited(copy, "tokenizer.json", swap)
    assert refused(copy) == [
        f"its tokenizer has 'b' as token {first}, and the run's has 'a': it would be asked about "
        "other tokens than those that were drawn; use a teacher of the run's vocabulary"
    ]


def test_a_teacher_without_a_token_of_the_run_is_refused(copy):
    def drop(entries):
        last = max(entries["model"]["vocab"], key=entries["model"]["vocab"].get)
        del entries["model"]["vocab"][last]

    edited(copy, "tokenizer.json", drop)
    (line,) = refused(copy)
    assert line.startswith("its tokenizer has no token ") and "the run's has '" in line


def test_all_that_is_wrong_with_a_teacher_is_listed_together(copy):
    (copy / "tokenizer.json").unlink()
    edited(copy, "config.json", lambda c: c.update(auto_map={"AutoModel": "x"}))
    lines = refused(copy, "model.max_length=200", "trainer.tp=8", "batch_invariant=true",
                    "invariant.chunks=32")  # fmt: skip
    assert [line.split(";")[0].split(" (")[0] for line in lines] == [
        "config.json asks for custom code",
        "tokenizer.json is missing, by which its vocabulary is compared",
        "its context is 128 tokens, model.max_length is 200",
        "trainer.tp=8 does not divide its 4 heads",
        "invariant.chunks=32 does not divide its widths 80",
    ]
    assert refused(copy / "nowhere") == [
        f"no such directory ({copy / 'nowhere'}); name a Hugging Face model directory on this "
        "machine"
    ]
    (copy / "model.safetensors").unlink()
    assert any("safetensors" in line for line in refused(copy))


def test_a_teacher_of_an_unknown_family_or_function_is_refused_by_its_own_keys(copy):
    edited(copy, "config.json", lambda c: c.update(attention_bias=True))
    (line,) = refused(copy)
    assert "attention_bias=true" in line and "teacher.ignore_config=[attention_bias]" in line
    ignored = conf_of(f"teacher.path={copy}", "teacher.ignore_config=[attention_bias]")
    assert read_teacher(ignored, "cpu", POLICY, None) == shape_of_directory(
        copy, ["attention_bias"]
    )
    edited(copy, "config.json", lambda c: c.update(model_type="mamba"))
    assert refused(copy)[0].startswith("model_type 'mamba' is not supported")


def test_a_teacher_that_ends_answers_otherwise_is_warned_about(copy):
    conf, tokenizer = conf_of(f"teacher.path={copy}"), load_tokenizer(CHARACTERS)
    assert teacher_warnings(conf, tokenizer) == teacher_warnings(conf_of(), tokenizer) == []
    other = next(i for i in range(KNOWN) if i not in tokenizer.eos_ids)
    edited(copy, "config.json", lambda c: c.update(eos_token_id=other))
    edited(copy, "tokenizer_config.json", lambda c: c.pop("eos_token"))
    (line,) = teacher_warnings(conf, tokenizer)
    assert line.startswith(f"warning: teacher.path={copy}: it ends an answer with ")


def test_the_shipped_model_teaches_itself_nothing(solo_mesh):
    tiny = PACKAGE_DATA / "qwen3_tiny"
    words = [f"teacher.path={tiny}", "loss=distill"]
    for kl in ("sampled", "full"):
        conf = conf_of(*words, f"teacher.kl={kl}")
        shape = read_teacher(conf, "cpu", POLICY, load_tokenizer(CHARACTERS))
        settings = trainer_settings(conf, POLICY, "cpu", objective_for(conf), shape)
        trainer = Trainer(settings, build_meshes(plan_layout(conf, 1), "cpu"), CPU)
        share = unrewarded()
        accumulate(trainer, passes_in(share), objective_for(conf))
        metrics = trainer.update(1.0, num_tokens(share))
        assert metrics["teacher_kl"] == 0 == metrics["loss"]
        assert metrics["grad_norm"] < 1e-5
