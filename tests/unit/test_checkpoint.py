"""Checkpoints in a world of one: what is written, what is kept, what is passed over, what is
refused. Files of several ranks are made from layouts; real ranks are in `test_resume.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_trainer import built, settings_of

from mesh.checkpoint.files import (
    Entry,
    Index,
    file_problem,
    read_blocks,
    read_index,
    write_index,
    write_tensors,
)
from mesh.checkpoint.keeper import Checkpointer
from mesh.checkpoint.same_run import Inputs
from mesh.config.changes import changed
from mesh.config.keys import Refusal
from mesh.config.loading import load_conf, save_conf
from mesh.config.schema import Conf
from mesh.layout.holdings import local_tensors
from mesh.layout.reshard import ParamLayout, layouts_of
from mesh.lifecycle.files import run_dir_problems
from mesh.lifecycle.process import Process
from mesh.roles.trainer import Trainer
from mesh.roles.trainer_settings import Start

SHAPES = {"norm": (10,), "w1": (12, 8), "w2": (8, 12), "w3": (7, 4)}
TP_DIMS = {"w1": 0, "w2": 1}
KINDS = ("weights", "exp_avg")


def layouts_on(*grid: int) -> list[ParamLayout]:
    """Layouts on a mesh of this many dp_replicate, dp_shard and tp ranks."""
    ranks = torch.arange(grid[0] * grid[1] * grid[2]).view(grid).numpy()
    return layouts_of(SHAPES, TP_DIMS, ranks, fsdp=True)


def whole(kind: str, name: str) -> torch.Tensor:
    seed = torch.Generator().manual_seed(10 * KINDS.index(kind) + list(SHAPES).index(name))
    return torch.randn(SHAPES[name], generator=seed)


def saved(path: Path, layouts: list[ParamLayout]) -> Index:
    """What the ranks of these layouts write together."""
    files, path = {}, path / "step-5"
    path.mkdir()
    for rank in sorted({rank for layout in layouts for rank in layout.blocks}):
        own = {x.name: x.blocks[rank] for x in layouts if rank in x.blocks}
        own = {n: b for n, b in own.items() if first_of(layouts, n, b) == rank}
        tensors = {
            f"{k}/{n}": whole(k, n)[b.slices].contiguous() for n, b in own.items() for k in KINDS
        }
        file = path / f"rank-{rank}.safetensors"
        if own:
            files[file.name] = Entry(*write_tensors(file, tensors), own)
    write_index(path, Index(5, 5, 0, {"weights": "0"}, SHAPES, files))
    return read_index(path)


def first_of(layouts: list[ParamLayout], name: str, block: object) -> int:
    layout = next(layout for layout in layouts if layout.name == name)
    return min(rank for rank, held in layout.blocks.items() if held == block)


@pytest.mark.parametrize("source", [(1, 1, 1), (1, 2, 2), (2, 2, 1), (1, 3, 1), (1, 8, 2)])
@pytest.mark.parametrize("target", [(1, 1, 1), (1, 4, 1), (1, 1, 4), (2, 3, 2)])
def test_any_mesh_reads_what_any_other_wrote(tmp_path, source, target):
    index = saved(tmp_path, layouts_on(*source))
    stored = sum(entry.blocks[n].numel for entry in index.files.values() for n in entry.blocks)
    assert stored == sum(torch.Size(shape).numel() for shape in SHAPES.values()), "each once"
    layouts, seen = layouts_on(*target), 0
    for rank in range(target[0] * target[1] * target[2]):
        held = {x.name: x.blocks[rank] for x in layouts if rank in x.blocks}
        state = {k: {n: torch.full(b.size, torch.nan) for n, b in held.items()} for k in KINDS}
        read_blocks(tmp_path / "step-5", index, state, layouts, rank)
        for kind in KINDS:
            for name, block in held.items():
                assert torch.equal(state[kind][name], whole(kind, name)[block.slices])
                seen += 1
    assert seen >= 2 * len(SHAPES)


def test_another_model_is_refused_with_its_parameters(tmp_path):
    index = saved(tmp_path, layouts_on(1, 2, 1))
    other = [layout for layout in layouts_on(1, 1, 1) if layout.name != "w3"]
    with pytest.raises(ValueError, match="w3 is missing from the destination"):
        read_blocks(tmp_path / "step-5", index, {}, other, 0)


def test_blocks_that_do_not_tile_a_parameter_are_refused(tmp_path):
    index = saved(tmp_path, layouts_on(1, 2, 1))
    del index.files["rank-1.safetensors"]
    with pytest.raises(ValueError, match="ranks hold .* elements"):
        read_blocks(tmp_path / "step-5", index, {}, layouts_on(1, 1, 1), 0)


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda x: x.pop(f"{KINDS[1]}/w3"), f"of {KINDS[1]}/w3, and there is nothing"),
        (lambda x: x.update({f"{KINDS[0]}/w3": torch.zeros(2)}), "and there is F32 [2]"),
    ],
    ids=["missing", "of another shape"],
)
def test_a_file_that_does_not_hold_what_the_index_says_is_named(tmp_path, change, wrong):
    """Its checksum is right: the file was made so."""
    layouts = layouts_on(1, 1, 1)
    index, file = saved(tmp_path, layouts), tmp_path / "step-5" / "rank-0.safetensors"
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    write_tensors(file, tensors)
    state = {kind: {n: torch.zeros(s) for n, s in SHAPES.items()} for kind in KINDS}
    with pytest.raises(ValueError) as error:
        read_blocks(tmp_path / "step-5", index, state, layouts, 0)
    assert str(error.value).startswith(f"{file}: index.json says F32 ")
    assert wrong in str(error.value)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="rank-0.safetensors has .* bytes instead of"):
        read_blocks(tmp_path / "step-5", index, state, layouts, 0)


def conf_of(*words: str) -> Conf:
    common = ["conf=qwen3_tiny", "trainer.warmup_steps=20", "steps=100", "checkpoint.every=1"]
    return load_conf([*common, *words])[1]


def trainer_of(conf: Conf) -> Trainer:
    """From the weights in model.path where that is no shipped model, else from random ones."""
    shipped = conf.model.path is None or conf.model.path.startswith("package:")
    start = Start(None if shipped else Path(str(conf.model.path)), seed=3)
    settings = settings_of(conf)
    frozen = {name: replace(source, start=start) for name, source in settings.frozen.items()}
    return built(replace(settings, start=start, frozen=frozen), conf)


def advance(trainer: Trainer, seed: int) -> dict[str, float]:
    """One update with random gradients."""
    assert trainer.model is not None
    generator = torch.Generator().manual_seed(seed)
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad.to_local().normal_(generator=generator)
    return trainer.update(1.0, 0)


def advance_badly(trainer: Trainer) -> dict[str, float]:
    """A step whose gradient has one infinity."""
    assert trainer.model is not None
    for parameter in trainer.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    parameter.grad.to_local().view(-1)[0] = torch.inf
    return trainer.update(1.0, 0)


def bits_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {
            f"{kind}/{name}": tensor.clone()
            for kind, tensors in trainer.state().items()
            for name, tensor in local_tensors(tensors).items()
        }


def run_with(process: Process, path: Path, steps: int, *words: str) -> tuple[Conf, Trainer]:
    """A run directory with its checkpoints, and the trainer after the last one."""
    conf = conf_of(*words)
    path.mkdir(exist_ok=True)
    (path / "metrics.jsonl").touch()
    (path / "samples.jsonl.gz").touch()
    trainer = trainer_of(conf)
    keeper = Checkpointer(conf, path, process, trainer, Inputs())
    for step in range(1, steps + 1):
        advance(trainer, step)
        keeper.after(step, stop=step == steps)
    return conf, trainer


def names_in(path: Path) -> list[str]:
    """The checkpoints, and whatever else is beside the copy of the logs."""
    held = {item.name for item in (path / "checkpoints").iterdir()}
    return sorted(held - {"logs"})


def loaded(process: Process, path: Path, conf: Conf) -> tuple[int, Trainer]:
    trainer = trainer_of(conf)
    conf = changed(conf, {"resume": str(path)})
    return Checkpointer(conf, path, process, trainer, Inputs()).load(), trainer


def test_a_loaded_trainer_takes_the_same_next_step(process, tmp_path):
    """Bits of weights and both moments; the warm-up and the bias correction go on."""
    conf, trainer = run_with(process, tmp_path / "run", 3)
    step, other = loaded(process, tmp_path / "run", conf)
    assert (step, other.steps) == (3, 3)
    for _ in range(2):
        mine, theirs = bits_of(trainer), bits_of(other)
        assert len(mine) > 60 and mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        assert all(float(t.abs().sum()) > 0 for name, t in mine.items() if "exp" in name)
        assert advance(trainer, 9) == advance(other, 9)


def test_after_a_skipped_step_the_bias_correction_continues(process, tmp_path):
    """AdamW counts updates, the warm-up counts steps: a checkpoint knows both."""
    conf, trainer = run_with(process, tmp_path / "run", 2, "on_nonfinite=skip")
    keeper = Checkpointer(conf, tmp_path / "run", process, trainer, Inputs())
    assert advance_badly(trainer)["skipped"] == 1
    keeper.after(3, stop=True)
    step, other = loaded(process, tmp_path / "run", conf)
    assert (step, other.steps, other.updates) == (3, 3, 2)
    for seed in (5, 6):
        mine, theirs = advance(trainer, seed), advance(other, seed)
        assert mine == theirs and mine["skipped"] == 0
        mine, theirs = bits_of(trainer), bits_of(other)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    index = json.loads((tmp_path / "run" / "checkpoints" / "step-3" / "index.json").read_text())
    assert (index["content"]["step"], index["content"]["updates"]) == (3, 2)


def advance_without_signal(trainer: Trainer) -> dict[str, float]:
    """A step whose gradient is 0."""
    assert trainer.model is not None
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return trainer.update(1.0, 0)


def test_the_count_of_steps_without_signal_survives_a_resume(process, tmp_path):
    """An index of before has none, which is 0."""
    conf, trainer = run_with(process, tmp_path / "run", 2)
    keeper = Checkpointer(conf, tmp_path / "run", process, trainer, Inputs())
    assert advance_without_signal(trainer)["steps_without_signal"] == 1
    keeper.after(3, stop=True)
    step, other = loaded(process, tmp_path / "run", conf)
    assert (step, other.steps, other.updates, other.without_signal) == (3, 3, 2, 1)
    for act in (advance_without_signal, lambda trainer: advance(trainer, 5)):
        mine, theirs = act(trainer), act(other)
        assert mine == theirs and mine["steps_without_signal"] == 2
        mine, theirs = bits_of(trainer), bits_of(other)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    path = tmp_path / "run" / "checkpoints" / "step-3" / "index.json"
    content = json.loads(path.read_text())["content"]
    assert content.pop("without_signal") == 1
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({"content": content, "sha256": digest}))
    assert loaded(process, tmp_path / "run", conf)[1].without_signal == 0


def test_keeps_the_newest_and_leaves_foreign_files_alone(process, tmp_path, capsys):
    path = tmp_path / "run" / "checkpoints"
    foreign = [path / "notes.txt", path / "step-best" / "x", path / "my-step-1" / "x"]
    outside = tmp_path / "outside"
    for file in (*foreign, path / "step-9.partial" / "x", outside / "x"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("kept")
    (path / "step-8.partial").symlink_to(outside)
    _, trainer = run_with(process, tmp_path / "run", 7, "checkpoint.every=2")
    mine = {"step-6", "step-7"}
    assert set(names_in(tmp_path / "run")) == mine | {"notes.txt", "step-best", "my-step-1"}
    assert all(file.read_text() == "kept" for file in (*foreign, outside / "x"))
    assert f"to continue after step 7: resume={tmp_path / 'run'}" in capsys.readouterr().out
    stored = load_file(path / "step-7" / "rank-0.safetensors")
    bits = bits_of(trainer)
    assert stored.keys() == bits.keys()
    assert all(torch.equal(stored[name], bits[name]) for name in bits)


def test_without_asking_one_is_written_where_a_run_is_stopped_early_alone(process, tmp_path):
    conf, trainer = conf_of("checkpoint.every=0", "steps=3"), trainer_of(conf_of())
    for name in ("metrics.jsonl", "samples.jsonl.gz"):
        (tmp_path / name).touch()
    keeper = Checkpointer(conf, tmp_path, process, trainer, Inputs())
    keeper.after(1, stop=False)
    keeper.after(3, stop=True)
    assert not (tmp_path / "checkpoints").exists()
    keeper.after(2, stop=True)
    assert names_in(tmp_path) == ["step-2"]


def test_old_ones_that_a_killed_run_left_are_removed_when_it_is_resumed(process, tmp_path):
    """It died between the renaming of the newest and the removal of the oldest."""
    conf, _ = run_with(process, tmp_path / "run", 4, "checkpoint.keep=4")
    conf = changed(conf, {"checkpoint.keep": 2})
    assert loaded(process, tmp_path / "run", conf)[0] == 4
    assert names_in(tmp_path / "run") == ["step-3", "step-4"]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_checkpoint_survives_a_kill_while_another_takes_its_place(process, tmp_path, replaced):
    """Between the two renames of `Checkpointer.complete`, or before the removal of the old one."""
    conf, _ = run_with(process, tmp_path / "run", 2, "checkpoint.keep=1")
    path = tmp_path / "run" / "checkpoints"
    shutil.copytree(path / "step-2", path / "step-2.partial")
    (path / "step-2").rename(path / "step-2.old.partial")
    if replaced:
        (path / "step-2.partial").rename(path / "step-2")
    assert loaded(process, tmp_path / "run", conf)[0] == 2
    assert names_in(tmp_path / "run") == ["step-2"]


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def rewritten(path: Path, change: Callable[[dict], None]) -> None:
    stored = json.loads((path / "index.json").read_text())
    change(stored)
    (path / "index.json").write_text(json.dumps(stored))


def to_a_link(path: Path) -> None:
    aside = path.parent.parent.parent / f"aside-{path.name}"
    path.rename(aside)
    path.symlink_to(aside)


RANK_0 = "rank-0.safetensors"
DAMAGES: dict[str, Callable[[Path], None]] = {
    "the checksum of rank-0.safetensors is wrong": lambda p: flip(p / RANK_0, -5),
    "rank-0.safetensors has": lambda p: os.truncate(p / RANK_0, 1000),
    "rank-0.safetensors: No such file": lambda p: (p / RANK_0).unlink(),
    "rank-0.safetensors: Too many levels": lambda p: to_a_link(p / RANK_0),
    "is a symbolic link, which is not followed": to_a_link,
    "index.json: No such file": lambda p: (p / "index.json").unlink(),
    "index.json: Too many levels": lambda p: to_a_link(p / "index.json"),
    "is truncated": lambda p: os.truncate(p / "index.json", 300),
    "the checksum of index.json is wrong": lambda p: rewritten(
        p, lambda index: index["content"].update(step=7)
    ),
    "is not the index": lambda p: (p / "index.json").write_text("[]"),
}


def test_damaged_checkpoints_are_named_and_passed_over(process, tmp_path, capsys):
    """Each damage to a copy of one run with two checkpoints; the older one is loaded."""
    run_with(process, tmp_path / "run", 2)
    for number, (said, damage) in enumerate(DAMAGES.items()):
        path = tmp_path / f"copy-{number}" / "run"
        shutil.copytree(tmp_path / "run", path)
        damage(path / "checkpoints" / "step-2")
        step, trainer = loaded(process, path, conf_of())
        assert step == 1, said
        out = capsys.readouterr().out
        assert f"skipping {path}/checkpoints/step-2: " in out and said in out
        assert f"resumed from {path}/checkpoints/step-1" in out
        stored = load_file(path / "checkpoints" / "step-1" / RANK_0)
        assert all(torch.equal(stored[name], bits) for name, bits in bits_of(trainer).items())
        assert names_in(path) == ["step-1", "step-2.damaged"]


def test_without_a_whole_checkpoint_there_is_nothing_to_resume(process, tmp_path):
    conf, _ = run_with(process, tmp_path / "run", 1)
    flip(tmp_path / "run" / "checkpoints" / "step-1" / RANK_0, 5000)
    with pytest.raises(ValueError, match=r"no intact checkpoint in .*/run/checkpoints; start"):
        loaded(process, tmp_path / "run", conf)
    with pytest.raises(ValueError, match=f"resume={tmp_path / 'run'}: no intact checkpoint"):
        loaded(process, tmp_path / "run", conf)


def test_what_may_be_whole_is_left_as_it_is(process, tmp_path):
    """Of another version of this program, or on a disk that cannot be read at the moment."""
    conf, _ = run_with(process, tmp_path / "run", 1)
    path = tmp_path / "run" / "checkpoints" / "step-1"
    other = (lambda c: c.update(format=2), 2), (lambda c: c.pop("format"), 1)
    for change, version in other:
        rewritten(path, lambda index, change=change: change(index["content"]))
        said = f"{path} has checkpoint format {version}, this version of mesh reads 5; resume with"
        with pytest.raises(Refusal, match=said):
            loaded(process, tmp_path / "run", conf)
        assert names_in(tmp_path / "run") == ["step-1"]
    with pytest.raises(OSError, match="File name too long"):
        file_problem(path / ("x" * 300), Entry(0, "", {}))


def bytes_in(path: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_load_before_takes_an_earlier_one_and_changes_nothing(process, tmp_path, capsys):
    """Of steps 1 to 4, whole but for step 3, and something half-written."""
    path, conf = tmp_path / "run", conf_of("checkpoint.keep=9")
    _, first = run_with(process, path, 1, "checkpoint.keep=9")
    shutil.rmtree(path)
    run_with(process, path, 4, "checkpoint.keep=9")
    flip(path / "checkpoints" / "step-3" / RANK_0, 5000)
    (path / "checkpoints" / "step-5.partial").mkdir()
    before, conf = bytes_in(tmp_path), changed(conf, {"checkpoint.every": 0})
    for limit, step in ((9, 4), (5, 4), (4, 2), (3, 2), (2, 1), (1, 0)):
        trainer = trainer_of(conf)
        new = bits_of(trainer)
        assert Checkpointer(conf, path, process, trainer, Inputs()).load_before(limit) == step
        assert trainer.steps == step
        passed = f"skipping {path}/checkpoints/step-3: the checksum of {RANK_0} is wrong"
        assert (passed in capsys.readouterr().out) == (limit == 4)
        expected = {0: new, 1: bits_of(first)}.get(step, {})
        assert all(torch.equal(expected[name], bits) for name, bits in bits_of(trainer).items()
                   if expected)  # fmt: skip
    assert bytes_in(tmp_path) == before
    assert (path / "checkpoints" / "step-5.partial").is_dir()
    shutil.rmtree(path / "checkpoints")
    assert Checkpointer(conf, path, process, trainer_of(conf), Inputs()).load_before(4) == 0
    assert not (path / "checkpoints").exists()


def test_a_checkpoint_of_another_seed_is_refused(process, tmp_path):
    run_with(process, tmp_path / "run", 1)
    with pytest.raises(ValueError, match=r"seed=4: .*step-1 belongs to a run with seed 0; use 0"):
        loaded(process, tmp_path / "run", conf_of("seed=4"))


def test_a_full_disk_ends_the_run_and_loses_no_older_checkpoint(process, tmp_path):
    """A limit on the size of files stands for the full disk: the same write fails half-way."""
    conf, trainer = run_with(process, tmp_path / "run", 1)
    keeper = Checkpointer(conf, tmp_path / "run", process, trainer, Inputs())
    before = bits_of(trainer)
    advance(trainer, 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(RuntimeError) as caught:
            keeper.after(2, stop=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    partial = tmp_path / "run" / "checkpoints" / "step-2.partial" / RANK_0
    assert f"checkpoint of step 2 could not be written: {partial}: [Errno 27]" in str(caught.value)
    assert names_in(tmp_path / "run") == ["step-1"]
    step, other = loaded(process, tmp_path / "run", conf)
    assert step == 1
    assert all(torch.equal(before[name], bits) for name, bits in bits_of(other).items())


def test_a_directory_that_cannot_be_made_or_is_a_link_is_refused_at_the_start(process, tmp_path):
    trainer, path = trainer_of(conf_of()), tmp_path / "checkpoints"
    path.write_text("a file")
    with pytest.raises(RuntimeError, match=f"cannot access checkpoints: {path}: File exists"):
        Checkpointer(conf_of(), tmp_path, process, trainer, Inputs())
    path.unlink()
    path.symlink_to(tmp_path.parent)
    with pytest.raises(RuntimeError, match=f"{path}: is a symbolic link, which is not followed"):
        Checkpointer(conf_of(), tmp_path, process, trainer, Inputs())


def test_file_problem_reads_every_byte(tmp_path):
    """A bit at the start, in the middle and at the end of a file longer than one read."""
    path = tmp_path / "rank-0.safetensors"
    length, sha256 = write_tensors(path, {"w": torch.randn(3 << 19)})
    entry = Entry(length, sha256, {})
    assert length == path.stat().st_size > 4 << 20
    assert file_problem(path, entry) is None
    for at in (0, length // 2, length - 1):
        flip(path, at)
        assert file_problem(path, entry) == "the checksum of rank-0.safetensors is wrong"
        flip(path, at)


def test_an_index_that_names_a_file_elsewhere_is_refused(tmp_path):
    write_index(tmp_path, Index(1, 1, 0, {}, {}, {"../rank-0.safetensors": Entry(1, "", {})}))
    with pytest.raises(ValueError, match=r"'\.\./rank-0\.safetensors', which is outside the"):
        read_index(tmp_path)


def refusal(*words: str, resumes: bool = True) -> str:
    with pytest.raises(ValueError) as caught:
        load_conf(list(words), resumes)
    return str(caught.value)


def test_a_resumed_run_has_its_own_keys_but_for_how_it_runs(tmp_path):
    conf = conf_of("trainer.lr=1e-4", "task_args.max_length=3", "eval.every=7")
    save_conf(conf, tmp_path / "config.yaml")
    words = [f"resume={tmp_path}", "trainer.tp=2", "mesh.mode=split", "steps=200", "seed=0"]
    words += ["reward.on_failure=zero", "reward.timeout_seconds=5"]
    _, resumed = load_conf(words, resumes=True)
    given = {"trainer.tp": 2, "mesh.mode": "split", "steps": 200, "reward.on_failure": "zero"}
    given |= {"reward.timeout_seconds": 5.0, "run_dir": str(tmp_path), "resume": str(tmp_path)}
    assert resumed == changed(conf, given)
    wrong = refusal(*words, "trainer.lr=2e-4", "task_args.max_length=4", "run_dir=x", "seed=1")
    keys = ("trainer.lr=0.0002", "task_args=", "run_dir=x", "seed=1")
    assert wrong.startswith("4 problems") and all(f"- {key}" in wrong for key in keys)
    assert "the run computes with 0.0001; leave it out, or start a new run" in wrong


def test_a_resumed_run_may_raise_the_context_unless_the_run_skips_what_is_longer(tmp_path):
    save_conf(conf_of("model.max_length=32"), tmp_path / "config.yaml")
    word = f"resume={tmp_path}"
    _, raised = load_conf([word, "model.max_length=33", "overlong=skip"], resumes=True)
    assert (raised.model.max_length, raised.overlong) == (33, "skip")
    assert (
        "model.max_length=31: the run computes with 32, which a resumed run may raise only; leave "
        "it out, or start a new run"
    ) in refusal(word, "model.max_length=31")
    save_conf(conf_of("model.max_length=32", "overlong=skip"), tmp_path / "config.yaml")
    assert (
        "model.max_length=33: the run skips what is longer than 32 (overlong=skip); leave it out"
    ) in refusal(word, "model.max_length=33")
    assert load_conf([word, "overlong=stop"], resumes=True)[1].overlong == "stop"


def test_what_cannot_resume_says_so(tmp_path):
    word = f"resume={tmp_path}"
    assert f"holds no run ({tmp_path}/config.yaml is not a file)" in refusal(word)
    save_conf(conf_of(), tmp_path / "config.yaml")
    instead = "continue it by recipes/grpo.py resume=RUN_DIR, without conf="
    assert instead in refusal("conf=qwen3_tiny", word)
    assert instead in refusal(word, resumes=False)
    (tmp_path / "other.yaml").write_text(f"defaults: qwen3_tiny\nresume: {tmp_path}\n")
    assert "a config cannot resume" in refusal(f"conf={tmp_path / 'other.yaml'}")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/null")
    _, conf = load_conf([word], resumes=True)
    (problem,) = run_dir_problems(conf)
    assert "holds symbolic links (metrics.jsonl), which are not followed" in problem
