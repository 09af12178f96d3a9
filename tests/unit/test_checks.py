"""What is refused at start-up: files, directories, devices and token counts, listed together."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mesh.config.changes import changed
from mesh.config.loading import load_conf
from mesh.config.schema import Conf, GeneratorConf, LogConf, MeshConf, ModelConf, TrainerConf
from mesh.program import checks
from mesh.program.checks import sequence_problems, truncation_problems
from mesh.types import ModelShape

TINY = ModelShape(128, 128, 2, 4, 4, 32, 384)
SOURCE = "copy it from the model's source"
WEIGHTS = f"{SOURCE}, or set model.init=random"
TOKENIZER = "copy it there, or set model.tokenizer=DIRECTORY"
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="needs no GPU")


def conf_problems(conf: Conf, *more, **options) -> list[str]:
    """On the device that is asked for."""
    return checks.conf_problems(conf, conf.device, *more, **options)


def random_conf(**keys) -> Conf:
    """A configuration without problems: random weights, on the CPU."""
    keys.setdefault("model", ModelConf(init="random"))
    return Conf(device="cpu", **keys)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A whole model directory with one weight file."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    save_file({"a": torch.zeros(5), "b": torch.ones(2, 3)}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(model: Path) -> Path:
    """The same in two shards and an index."""
    (model / "model.safetensors").unlink()
    names = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}
    for name, shard in names.items():
        save_file({name: torch.zeros(5)}, model / shard, metadata={"format": "pt"})
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return model


def path_problems(path: Path, **keys) -> list[str]:
    """The problems of a model directory, without the key and value that all begin with."""
    found = conf_problems(random_conf(model=ModelConf(path=str(path), **keys)))
    start = f"model.path={path}: "
    assert all(line.startswith(start) for line in found)
    return [line.removeprefix(start) for line in found]


def test_defaults_with_random_weights_have_no_problems():
    assert conf_problems(random_conf()) == []


def test_whole_model_directories_have_no_problems(model: Path):
    assert path_problems(model) == []


def test_whole_sharded_directory_has_no_problems(sharded: Path):
    assert path_problems(sharded) == []


def test_no_model_path():
    assert conf_problems(Conf(device="cpu")) == [
        "model.path is not set: there are no weights to start from; set model.path=DIRECTORY "
        "(Hugging Face form), or model.init=random"
    ]


def test_missing_directory(tmp_path: Path):
    gone = tmp_path / "gone"
    assert path_problems(gone) == [
        f"no such directory ({gone}); name a Hugging Face model directory on this machine"
    ]


def test_empty_directory_lists_every_missing_file(tmp_path: Path):
    assert path_problems(tmp_path) == [
        f"config.json is missing; {SOURCE}",
        f"tokenizer.json is missing; {TOKENIZER}",
        f"there is neither model.safetensors nor model.safetensors.index.json; {WEIGHTS}",
    ]


def test_random_weights_need_no_weight_file_but_a_config(tmp_path: Path):
    assert path_problems(tmp_path, init="random") == [
        f"config.json is missing; {SOURCE}",
        f"tokenizer.json is missing; {TOKENIZER}",
    ]


def test_tokenizer_may_lie_elsewhere(model: Path, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("tokenizer")
    (model / "tokenizer.json").rename(elsewhere / "tokenizer.json")
    assert path_problems(model) == [f"tokenizer.json is missing; {TOKENIZER}"]
    assert path_problems(model, tokenizer=str(elsewhere)) == []
    (elsewhere / "tokenizer.json").unlink()
    conf = random_conf(model=ModelConf(path=str(model), tokenizer=str(elsewhere)))
    assert conf_problems(conf) == [
        f"model.tokenizer={elsewhere}: no tokenizer.json; name a directory that has one, or unset "
        "it (null)"
    ]


def test_config_that_is_not_json(model: Path):
    (model / "config.json").write_text("{")
    (line,) = path_problems(model)
    assert line.startswith("config.json is not JSON (") and line.endswith(f"; {SOURCE}")


def test_missing_shards_are_named(sharded: Path):
    for shard in sharded.glob("*-of-2.safetensors"):
        shard.unlink()
    assert path_problems(sharded) == [
        f"model-1-of-2.safetensors is missing; {WEIGHTS}",
        f"model-2-of-2.safetensors is missing; {WEIGHTS}",
    ]


@pytest.mark.parametrize(
    ("text", "wrong"), [("[]", "is not a JSON object"), ("{}", "has no weight_map")]
)
def test_index_without_a_map(sharded: Path, text: str, wrong: str):
    (sharded / "model.safetensors.index.json").write_text(text)
    assert path_problems(sharded) == [f"model.safetensors.index.json {wrong}; {WEIGHTS}"]


@pytest.mark.parametrize("cut", [1, 40])
def test_shard_whose_data_was_cut_short(sharded: Path, cut: int):
    shard = sharded / "model-2-of-2.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-cut])
    kept, size = len(whole) - cut, len(whole)
    header_intact = cut < 20
    wrong = f"has {kept} bytes instead of {size}" if header_intact else "is not a safetensors file"
    (line,) = path_problems(sharded)
    assert line.startswith(f"model-2-of-2.safetensors {wrong}") and line.endswith(WEIGHTS)


def test_git_lfs_pointer_is_not_a_weight_file(model: Path):
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert path_problems(model) == [
        f"model.safetensors is not a safetensors file, or is truncated; {WEIGHTS}"
    ]


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_run_dir_that_holds_a_run(tmp_path: Path, name: str):
    conf = random_conf(run_dir=str(tmp_path))
    assert conf_problems(conf) == []
    (tmp_path / name).write_text("")
    assert conf_problems(conf) == [
        f"run_dir={tmp_path}: already holds a run ({name}); name another directory, or move that "
        "run away"
    ]


def test_seed_is_at_most_what_the_random_numbers_take():
    assert conf_problems(random_conf(seed=2**63 - 1)) == []
    (line,) = conf_problems(random_conf(seed=2**63))
    assert line.startswith(f"seed={2**63}: must be >= 0 and < {2**63}")


def test_run_dir_that_is_a_file(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("")
    assert conf_problems(random_conf(run_dir=str(path))) == [
        f"run_dir={path}: is a file; name a directory"
    ]


@without_cuda
def test_cuda_asked_for_without_it():
    assert conf_problems(Conf(device="cuda", model=ModelConf(init="random"))) == [
        "device=cuda: torch finds no CUDA device here; set device=cpu, or install a CUDA build of "
        "torch"
    ]


@without_cuda
def test_page_size_on_cuda_is_a_multiple_of_256():
    keys = GeneratorConf(page_size=300)
    conf = Conf(device="cuda", model=ModelConf(init="random"), generator=keys)
    assert conf_problems(conf)[1:] == [
        "generator.page_size=300: the CUDA attention kernel wants a multiple of 256; use 512, or 0 "
        "for the default"
    ]


@without_cuda
def test_fp32_on_cuda_is_not_captured():
    keys = GeneratorConf(dtype="float32")
    conf = Conf(device="cuda", model=ModelConf(init="random"), generator=keys)
    assert conf_problems(conf)[1:] == [
        "generator.dtype=float32: its decode steps cannot be captured as CUDA graphs; use "
        "bfloat16, or set generator.cuda_graphs=false"
    ]
    assert conf_problems(changed(conf, {"generator.cuda_graphs": False}))[1:] == []


@needs_cuda
def test_more_processes_than_gpus(monkeypatch):
    gpus = torch.cuda.device_count()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(gpus + 1))
    assert checks.conf_problems(Conf(model=ModelConf(init="random")), "cuda") == [
        f"device=auto: {gpus + 1} processes on this machine, which has {gpus} GPUs; start at most "
        f"{gpus}, or set device=cpu"
    ]


def test_token_counts_that_leave_no_room():
    conf = random_conf(
        model=ModelConf(init="random", max_length=100),
        trainer=TrainerConf(microbatch_tokens=99),
        generator=GeneratorConf(max_new_tokens=100, kv_tokens=111),
    )
    assert conf_problems(conf) == [
        "generator.max_new_tokens=100: leaves no room for a prompt in model.max_length=100; use at "
        "most 99, or raise model.max_length",
        "generator.kv_tokens=111: in pages of 16 it does not hold one sequence of "
        "model.max_length=100; use at least 112, or 0 for the default",
        "trainer.microbatch_tokens=99: one sequence of model.max_length=100 does not fit; use at "
        "least 100, or lower model.max_length",
    ]
    assert len(conf_problems(conf, training=False)) == 2  # no row is packed
    room = {"trainer.microbatch_tokens": 100, "generator.max_new_tokens": 99}
    assert conf_problems(changed(conf, room | {"generator.kv_tokens": 112})) == []


def test_context_longer_than_the_models_own():
    conf = random_conf(model=ModelConf(init="random", max_length=4097))
    shape = dataclasses.replace(TINY, max_positions=4096)
    assert conf_problems(conf, shape) == [
        "model.max_length=4097: the model's own context is 4096 tokens "
        "(max_position_embeddings, or a sliding_window); "
        "use at most 4096"
    ]
    assert conf_problems(changed(conf, {"model.max_length": 4096}), shape) == []


def test_loggers_that_are_not_installed(monkeypatch):
    for package in ("wandb", "trackio", "tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)
    conf = random_conf(log=LogConf(wandb="mine", trackio="ours"))
    assert conf_problems(conf) == [
        "log.wandb=mine: wandb is not installed; pip install wandb, or unset it (null)",
        "log.trackio=ours: trackio is not installed; pip install trackio, or unset it (null)",
        "log.tensorboard=true: tensorboard is not installed; pip install tensorboard, or set "
        "log.tensorboard=false",
    ]
    assert conf_problems(conf, training=False) == []
    assert conf_problems(random_conf(log=LogConf(tensorboard=False))) == []


def test_one_file_is_read_before_an_index_with_missing_shards(sharded: Path):
    """As `transformers` does, and as the loader does."""
    for shard in sharded.glob("*-of-2.safetensors"):
        shard.unlink()
    save_file({"a": torch.zeros(5)}, sharded / "model.safetensors")
    assert path_problems(sharded) == []


def test_check_start_lists_everything_together(tmp_path: Path):
    conf = random_conf(
        model=ModelConf(path=str(tmp_path / "gone")),
        mesh=MeshConf(mode="split"),
        generator=GeneratorConf(dp=1, tp=3),
        steps=0,
        num_prompts=63,
    )
    with pytest.raises(ValueError) as caught:
        checks.check_start(conf, "cpu", 5, TINY)
    assert str(caught.value).splitlines() == [
        "4 problems with the configuration:",
        "- steps=0: must be >= 1; the default is 100",
        f"- model.path={tmp_path / 'gone'}: no such directory ({tmp_path / 'gone'}); name a "
        "Hugging Face model directory on this machine",
        "- num_prompts=63: is not a multiple of 2, which waves=1, 2 data-parallel ranks of the "
        "trainer and 1 of the generator require; use 62 or 64",
        "- generator.tp=3: does not divide the model's 4 heads, 4 kv heads, 128 vocabulary "
        "entries; choose one of 1, 2, 4",
    ]


def test_check_start_passes_and_lists_a_range_only_once():
    checks.check_start(random_conf(), "cpu", 2, TINY)
    with pytest.raises(ValueError, match=r"^1 problem with the configuration:\n- group_size=1: "):
        checks.check_start(random_conf(group_size=1), "cpu", 2, TINY)


def test_sequence_parallelism_without_ranks_to_share_is_refused():
    _, conf = load_conf(["conf=qwen3_tiny", "trainer.sequence_parallel=true"])
    assert "trainer.sequence_parallel=true: " in sequence_problems(conf)[0]
    assert "trainer.tp=2" in sequence_problems(conf)[0]
    assert sequence_problems(changed(conf, {"trainer.tp": 2})) == []


TRUNCATED = ["conf=qwen3_tiny", "truncated_logprobs=true"]


def test_truncated_logprobs_need_a_truncation_and_equal_bits():
    found = truncation_problems(load_conf(TRUNCATED)[1])
    assert [line.partition(": ")[0] for line in found] == ["truncated_logprobs=true"] * 2
    assert "nothing is truncated" in found[0] and "batch_invariant=true" in found[1]
    exact = [*TRUNCATED, "batch_invariant=true", "generator.top_p=0.9"]
    for words in ([], ["engine=vllm"]):
        assert truncation_problems(load_conf([*exact, *words])[1]) == []
    own = [*TRUNCATED, "generator.top_k=5", "engine=vllm", "vllm.model=native"]
    (line,) = truncation_problems(load_conf(own)[1])
    assert "engine=vllm vllm.model=native cannot be exact: use engine=native and set batch_" in line
    both = checks.conf_problems(load_conf([*own, "batch_invariant=true"])[1], "cpu")
    assert any(line.startswith("vllm.model=native: ") for line in both)
