"""What checkpoints know of the past, in a world of one: the logs, the best model, the reference."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoint import RANK_0, advance, conf_of, flip, names_in, rewritten, trainer_of

from mesh.checkpoint.files import _sha256_of, read_index
from mesh.checkpoint.keeper import Checkpointer
from mesh.checkpoint.logs import KEPT_LOGS
from mesh.checkpoint.same_run import Inputs
from mesh.config.schema import Conf
from mesh.lifecycle.process import Process
from mesh.model.exported import planned_export
from mesh.model.families import TINY, config_entries
from mesh.model.hf import export
from mesh.text.tokenizer import CHARACTERS

EXPORT = planned_export(config_entries(TINY, (1,)), (1,), torch.float32, CHARACTERS)


class Small:
    """A run that takes steps with random gradients: it logs, evaluates as it is told, keeps."""

    def __init__(self, process: Process, path: Path, *words: str, resume: bool = False) -> None:
        self.path, self.conf = path, conf_of(*words)
        path.mkdir(exist_ok=True)
        self.trainer = trainer_of(self.conf)
        if resume:
            self.conf = replace(self.conf, resume=str(path))
        self.keeper = Checkpointer(self.conf, path, process, self.trainer, Inputs())
        self.step = self.keeper.load() if resume else 0

    def log(self, name: str) -> None:
        with open(self.path / name, "a") as file:
            file.write(json.dumps({"step": self.step, "of": name}) + "\n")

    def evaluated(self, value: float) -> None:
        metrics = {"loss": 1.0, "eval/accuracy": value, "eval/reward": 1 - value}
        self.keeper.consider(self.step, metrics, self.save)

    def save(self, path: Path) -> None:
        export(path, self.trainer.parameters(), TINY, EXPORT, write=True)

    def take(self, steps: int, values: dict[int, float] | None = None, odd: str = "") -> None:
        """`values`: evaluations by step; `odd`: a log with a line of the odd steps alone."""
        for _ in range(steps):
            self.step += 1
            advance(self.trainer, self.step)
            for name in ("metrics.jsonl", "samples.jsonl.gz", *([odd] if self.step % 2 else [])):
                if name:
                    self.log(name)
            if values and self.step in values:
                self.evaluated(values[self.step])
            self.keeper.after(self.step, stop=False)
        self.keeper._finish(wait=True)

    def logs(self) -> dict[str, bytes]:
        paths = (self.path / name for name in KEPT_LOGS)
        return {path.name: path.read_bytes() for path in paths if path.exists()}

    def bests(self) -> list[str]:
        return sorted(path.name for path in (self.path / "best").iterdir())

    def named(self) -> dict[str, tuple[int, float] | None]:
        """The best model that each checkpoint names."""
        found = {n: read_index(self.path / "checkpoints" / n).best for n in names_in(self.path)}
        return {name: best and (best.step, best.value) for name, best in found.items()}


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 - 3)


def to_zeros(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


def to_a_directory_elsewhere(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent)


def gone_with_what_was_begun_anew(path: Path) -> None:
    """The resumed start before this one was killed while it put the file back."""
    path.unlink()
    path.with_name(path.name + ".partial").write_text('{"step": 1, "of"')


LOSSES: dict[str, Callable[[Path], object]] = {
    "later": lambda path: None, "gone": Path.unlink, "empty": lambda path: os.truncate(path, 0),
    "cut": cut, "zeros": to_zeros, "bit": lambda path: flip(path, 10),
    "link": to_a_directory_elsewhere, "again": gone_with_what_was_begun_anew,
}  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
def test_logs_are_put_back_as_they_were_after_the_step(process, tmp_path, loss):
    run = Small(process, tmp_path / "run", "checkpoint.every=2")
    run.take(4, odd="nonfinite.jsonl")
    logged = run.logs()
    assert [text.count(b"\n") for text in logged.values()] == [4, 4, 2]
    run.take(1, odd="nonfinite.jsonl")
    for name in logged:
        with open(run.path / name, "a") as file:
            file.write('{"step": 6, "los')  # it was killed while it wrote this
        LOSSES[loss](run.path / name)
    again = Small(process, run.path, "checkpoint.every=2", resume=True)
    assert again.step == 4 and again.logs() == logged
    assert not [path for path in run.path.glob("*") if path.is_symlink()]
    assert not list(run.path.glob("*.partial"))
    again.take(2, odd="nonfinite.jsonl")
    steps = [json.loads(line)["step"] for line in again.logs()["metrics.jsonl"].splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6] and names_in(run.path) == ["step-4", "step-6"]


@pytest.mark.parametrize("name", ["nonfinite.jsonl", "timeline.jsonl"])
def test_a_log_of_later_steps_alone_goes(process, tmp_path, name):
    run = Small(process, tmp_path / "run", "checkpoint.every=2")
    run.take(2)
    run.log(name)
    logs = Small(process, run.path, resume=True).logs()
    assert logs.keys() == {"metrics.jsonl", "samples.jsonl.gz"}
    assert not (run.path / name).exists()


def test_checkpoints_share_one_copy_of_the_logs_that_grows(process, tmp_path):
    run = Small(process, tmp_path / "run", "checkpoint.every=1", "checkpoint.keep=3")
    copy = run.path / "checkpoints" / "logs"
    sizes = []
    for _ in range(3):
        run.take(1, odd="nonfinite.jsonl")
        assert {file.name: file.read_bytes() for file in copy.iterdir()} == run.logs()
        sizes.append(sum(map(len, run.logs().values())))
    with open(copy / "metrics.jsonl", "r+b") as file:
        file.write(b"?")  # a byte that is there is not written again
    run.take(1)
    assert (copy / "metrics.jsonl").read_bytes() == b"?" + run.logs()["metrics.jsonl"][1:]
    held = (run.path / "checkpoints").glob("step-*/*")
    assert {file.name for file in held} == {"index.json", RANK_0}, "none of its own"


def both(path: Path, damage: Callable[[Path], object]) -> None:
    for folder in (path, path / "checkpoints" / "logs"):
        damage(folder / "metrics.jsonl")


COPIES: dict[str, Callable[[Path], object]] = {
    "gone": lambda path: shutil.rmtree(path / "checkpoints" / "logs"),
    "cut": lambda path: cut(path / "checkpoints" / "logs" / "metrics.jsonl"),
    "bit": lambda path: flip(path / "checkpoints" / "logs" / "metrics.jsonl", 10),
}


@pytest.mark.parametrize("loss", COPIES)
def test_where_the_copy_is_damaged_the_runs_own_file_serves(process, tmp_path, loss):
    run = Small(process, tmp_path / "run", "checkpoint.every=2")
    run.take(4)
    logged = run.logs()
    run.log("metrics.jsonl")
    COPIES[loss](run.path)
    again = Small(process, run.path, "checkpoint.every=2", resume=True)
    assert again.step == 4 and again.logs() == logged
    again.take(2)
    copy = run.path / "checkpoints" / "logs"
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == again.logs()
    last = Small(process, run.path, "checkpoint.every=2", resume=True)
    assert last.step == 6 and last.logs() == again.logs()


def test_of_logs_that_are_damaged_twice_an_older_checkpoint_has_the_beginning(
    process, tmp_path, capsys
):
    words = ("checkpoint.every=1", "checkpoint.keep=4")
    run = Small(process, tmp_path / "run", *words)
    run.take(4)
    both(run.path, lambda path: flip(path, path.stat().st_size * 5 // 8))
    again = Small(process, run.path, *words, resume=True)
    assert again.step == 2 and again.logs()["metrics.jsonl"].count(b"\n") == 2
    assert capsys.readouterr().out.count("the checksum of metrics.jsonl is wrong") == 2
    again.take(1)
    copy = run.path / "checkpoints" / "logs"
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == again.logs()


def test_a_checkpoint_with_logs_of_its_own_is_read(process, tmp_path):
    """Format 4."""
    run = Small(process, tmp_path / "run", "checkpoint.every=2")
    run.take(2)
    logged = run.logs()
    (run.path / "checkpoints" / "logs").rename(tmp_path / "logs")
    for file in (tmp_path / "logs").iterdir():
        shutil.copy(file, run.path / "checkpoints" / "step-2")
        (run.path / file.name).unlink()
    again = Small(process, run.path, "checkpoint.every=2", resume=True)
    assert again.step == 2 and again.logs() == logged
    again.take(2)
    assert Small(process, run.path, resume=True).logs() == again.logs()


DAMAGED = "the first {} bytes of {} have changed since logged; resuming restores the file"


@pytest.mark.parametrize("loss", ["gone", "empty", "zeros", "bit"])
def test_a_log_that_is_damaged_while_it_runs_gets_into_no_checkpoint(process, tmp_path, loss):
    run, path = Small(process, tmp_path / "run", "checkpoint.every=2"), tmp_path / "run"
    run.take(2)
    logged = run.logs()
    LOSSES[loss](path / "metrics.jsonl")
    if loss != "gone":
        run.log("metrics.jsonl")
    with pytest.raises(RuntimeError) as caught:
        run.keeper.after(3, stop=True)
    said = DAMAGED.format(len(logged["metrics.jsonl"]), path / "metrics.jsonl")
    if loss == "gone":
        said = f"{path}/metrics.jsonl: No such file or directory"
    assert said in str(caught.value)
    again = Small(process, path, resume=True)
    assert (again.step, again.logs(), names_in(path)) == (2, logged, ["step-2"])


VALUES = {1: 0.25, 2: 0.5, 3: 0.5, 4: 0.375, 5: 0.75, 6: 0.75}


def test_the_first_of_the_best_is_kept_while_a_checkpoint_names_it(process, tmp_path, capsys):
    run = Small(process, tmp_path / "run", "checkpoint.every=2")
    run.evaluated(0.25)
    run.take(4, VALUES)
    assert run.named() == {"step-2": (2, 0.5), "step-4": (2, 0.5)} and run.bests() == ["step-2"]
    best = load_file(run.path / "best" / "step-2" / "model.safetensors")
    stored = load_file(run.path / "checkpoints" / "step-2" / RANK_0)
    assert (best["model.norm.weight"] == stored["weights/norm.weight"]).all()
    run.take(1, VALUES)
    assert run.bests() == ["step-2", "step-5"]
    run.take(1, VALUES)
    assert run.named() == {"step-4": (2, 0.5), "step-6": (5, 0.75)}
    assert run.bests() == ["step-2", "step-5"]
    run.take(2)
    assert run.bests() == ["step-5"]
    run.keeper.after(9, stop=True)
    said = f"best: eval/accuracy 0.750 of step 5, {run.path}/best/step-5"
    assert said in capsys.readouterr().out


def test_a_resumed_run_has_the_best_of_its_step(process, tmp_path):
    """The run before had found a later one, and was killed while it wrote one more."""
    run = Small(process, tmp_path / "run", "checkpoint.every=2")
    run.take(5, VALUES)
    (run.path / "best" / "step-6.partial").mkdir()
    flip(run.path / "best" / "step-5" / "model.safetensors", -1)
    again = Small(process, run.path, "checkpoint.every=2", resume=True)
    assert again.step == 4 and again.bests() == ["step-2"]
    again.take(2, VALUES)
    assert again.named()["step-6"] == (5, 0.75) and again.bests() == ["step-2", "step-5"]
    whole = Small(process, tmp_path / "whole", "checkpoint.every=2")
    whole.take(6, VALUES)
    assert whole.bests() == again.bests()
    for name in ("step-2", "step-5"):
        files = [{f.name: f.read_bytes() for f in (r.path / "best" / name).iterdir()}
                 for r in (whole, again)]  # fmt: skip
        assert files[0] == files[1] and "model.safetensors" in files[0]


def test_a_resumed_run_remembers_how_good_the_best_was(process, tmp_path):
    run = Small(process, tmp_path / "run", "checkpoint.every=2")
    run.take(4, VALUES)
    again = Small(process, run.path, "checkpoint.every=2", resume=True)
    again.take(2, {5: 0.5, 6: 0.4375})
    assert again.named()["step-6"] == (2, 0.5) and again.bests() == ["step-2"]


def test_the_best_may_follow_another_metric(process, tmp_path, capsys):
    """The largest reward is that of the smallest accuracy."""
    words = ["checkpoint.every=2", "checkpoint.best_metric=eval/reward"]
    run = Small(process, tmp_path / "run", *words)
    run.take(4, VALUES)
    assert run.named() == {"step-2": (1, 0.75), "step-4": (1, 0.75)} and run.bests() == ["step-1"]
    assert read_index(run.path / "checkpoints" / "step-4").best.metric == "eval/reward"
    run.keeper.best.report()
    assert f"best: eval/reward 0.750 of step 1, {run.path}/best/step-1" in capsys.readouterr().out
    again = Small(process, run.path, *words, resume=True)
    again.take(2, VALUES)
    assert again.named()["step-6"] == (1, 0.75)
    assert "best_metric" not in capsys.readouterr().out


def test_the_best_may_be_the_smallest(process, tmp_path, capsys):
    """The smallest accuracy, of which the first is kept; resumed, it is still the best."""
    words = ["checkpoint.every=2", "checkpoint.best_metric=-eval/accuracy"]
    run = Small(process, tmp_path / "run", *words)
    run.take(2, {1: 0.5, 2: 0.25})
    assert run.named() == {"step-2": (2, 0.25)}
    run.keeper.best.report()
    assert f"best: eval/accuracy 0.250 of step 2, {run.path}/best" in capsys.readouterr().out
    again = Small(process, run.path, *words, resume=True)
    again.take(2, {3: 0.25, 4: 0.5})
    assert again.named()["step-4"] == (2, 0.25) and "followed" not in capsys.readouterr().out
    again.take(2, {5: 0.125})
    assert again.named()["step-6"] == (5, 0.125)
    other = Small(process, run.path, "checkpoint.every=2", resume=True)
    assert "followed -eval/accuracy; the next" in capsys.readouterr().out
    assert other.keeper.best.current is None


def test_a_metric_that_an_evaluation_does_not_have_is_warned_of_once(process, tmp_path, capsys):
    words = ["checkpoint.every=2", "checkpoint.best_metric=eval/reward/steps"]
    run = Small(process, tmp_path / "run", *words)
    run.take(4, VALUES)
    said = capsys.readouterr().out
    assert said.count("warning") == 1 and run.bests() == []
    assert (
        "warning: checkpoint.best_metric=eval/reward/steps: this evaluation does not have it, and "
        "until one has, no best model is kept; it has eval/accuracy, eval/reward\n"
    ) in said


def to_format_3(index: dict) -> None:
    """It follows eval/accuracy, without saying so."""
    index["content"]["format"] = 3
    assert index["content"]["best"].pop("metric") == "eval/accuracy"
    index["sha256"] = _sha256_of(index["content"])


@pytest.mark.parametrize("older", [False, True])
def test_a_resumed_run_with_another_metric_begins_its_best_anew(process, tmp_path, capsys, older):
    run = Small(process, tmp_path / "run", "checkpoint.every=2")
    run.take(2, VALUES)
    words = ["checkpoint.every=2", "checkpoint.best_metric=eval/reward"]
    if older:
        rewritten(run.path / "checkpoints" / "step-2", to_format_3)
    again = Small(process, run.path, *words, resume=True)
    said = (
        f"checkpoint.best_metric=eval/reward: the best model so far, {run.path}/best/step-2, "
        "followed eval/accuracy; the next evaluation becomes the best"
    )
    assert said in capsys.readouterr().out and again.bests() == ["step-2"]
    again.take(2, VALUES)
    assert again.named() == {"step-2": (2, 0.5), "step-4": (4, 0.625)}
    assert again.bests() == ["step-2", "step-4"]
    again.take(2, {})
    assert again.named()["step-6"] == (4, 0.625) and again.bests() == ["step-4"]


def test_a_best_model_that_is_gone_is_told_and_looked_for_anew(process, tmp_path, capsys):
    run = Small(process, tmp_path / "run", "checkpoint.every=2")
    run.take(2, VALUES)
    cut(run.path / "best" / "step-2" / "model.safetensors")
    again = Small(process, run.path, "checkpoint.every=2", resume=True)
    said = f"{run.path}/best/step-2 is damaged: model.safetensors has"
    assert said in capsys.readouterr().out
    again.take(2, VALUES)
    assert again.named()["step-4"] == (3, 0.5)


def test_a_best_model_that_cannot_be_removed_ends_no_run(process, tmp_path, capsys):
    run = Small(process, tmp_path / "run", "checkpoint.every=2")
    run.take(2, VALUES)
    in_its_way = run.path / "best" / "step-2.partial"
    in_its_way.mkdir()
    (in_its_way / "file").touch()
    run.take(6, VALUES)
    assert run.named() == {"step-6": (5, 0.75), "step-8": (5, 0.75)}
    assert run.bests() == ["step-2", "step-2.partial", "step-5"]
    assert f"could not remove {run.path}/best/step-2" in capsys.readouterr().out


def test_a_resumed_run_that_keeps_none_leaves_those_that_are_there(process, tmp_path):
    run = Small(process, tmp_path / "run", "checkpoint.every=2")
    run.take(5, VALUES)
    again = Small(process, run.path, "checkpoint.every=2", "checkpoint.best=false", resume=True)
    again.take(4)
    assert again.bests() == ["step-2", "step-5"]


@pytest.mark.parametrize("word", ["checkpoint.best=false", "checkpoint.every=0"])
def test_no_best_model_is_kept_where_none_is_asked_for(process, tmp_path, word):
    run = Small(process, tmp_path / "run", word)
    run.take(2, VALUES)
    assert not (run.path / "best").exists()
    assert run.conf.checkpoint.best == (word != "checkpoint.best=false") and Conf().checkpoint.best


def exported(path: Path, run: Small) -> None:
    export(path, run.trainer.parameters(), TINY, EXPORT, write=True)


def test_a_reference_whose_weights_have_changed_is_refused(process, tmp_path):
    """One number of one tensor is another than when the run began."""
    start, path = tmp_path / "start", tmp_path / "run"
    exported(start, Small(process, tmp_path / "first"))
    words = [f"model.path={start}", "kl_coef=0.01", "checkpoint.every=2"]
    Small(process, path, *words).take(2)
    assert Small(process, path, *words, resume=True).step == 2
    flip(start / "model.safetensors", -3)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    said = rf"model.path={start}: its weights are not those that .*/step-2 has .* restore the orig"
    with pytest.raises(ValueError, match=said):
        Small(process, path, *words, resume=True)
    assert before == {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    flip(start / "model.safetensors", -3)
    assert Small(process, path, *words, resume=True).step == 2


def test_without_a_reference_the_start_may_go(process, tmp_path):
    start, path = tmp_path / "start", tmp_path / "run"
    exported(start, Small(process, tmp_path / "first"))
    words = [f"model.path={start}", "checkpoint.every=2"]
    Small(process, path, *words).take(2)
    flip(start / "model.safetensors", -3)
    assert Small(process, path, *words, resume=True).step == 2
