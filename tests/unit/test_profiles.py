"""The table of a profiler's trace, and how profiled steps are left out of the pace."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest
import torch

from mesh.config.keys import Refusal
from mesh.config.loading import load_conf
from mesh.config.sections import ProfileConf
from mesh.lifecycle.timers import PHASES, Phases
from mesh.program.assembly import check
from mesh.runs.profiles import profile_problems, profiled
from mesh.runs.progress import Pace
from mesh.runs.trace_table import BETWEEN, OWN, phase_times, self_times, table_of


def event(name: str, ts: float, dur: float, cat: str = "cpu_op", tid: int = 1) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "pid": 9, "tid": tid, "ts": ts, "dur": dur}


SECOND = 1e6
TRACE = [
    event("train", 0, 10 * SECOND, "user_annotation"),
    event("linear", 1 * SECOND, 6 * SECOND),
    event("mm", 2 * SECOND, 3 * SECOND),
    event("launch", 6 * SECOND, 0.5 * SECOND, "cuda_runtime"),
    event("backward", 7 * SECOND, 2 * SECOND, tid=2),  # by another thread
    event("kernel a", 3 * SECOND, 4 * SECOND, "kernel", tid=70),
    event("copy", 3.5 * SECOND, 0.5 * SECOND, "gpu_memcpy", tid=71),
    event("kernel b", 5 * SECOND, 4 * SECOND, "kernel", tid=71),  # on another stream
    event("add", 11 * SECOND, 1 * SECOND),
    event("sync", 12 * SECOND, 2 * SECOND, "user_annotation"),
    event("train", 14 * SECOND, 1 * SECOND, "user_annotation"),
    event("train", 0, 10 * SECOND, "gpu_user_annotation", tid=70),
    {"ph": "M", "name": "process_name", "pid": 9, "tid": 1, "ts": 0},
]


def test_an_operation_counts_without_what_it_called_on_its_own_thread():
    own = {e["name"]: seconds / SECOND for e, seconds in self_times(TRACE[:5])}
    assert own == {"train": 4.0, "linear": 2.5, "mm": 3.0, "launch": 0.5, "backward": 2.0}


def test_what_took_the_time_of_each_phase():
    found = phase_times(TRACE, PHASES)
    assert list(found) == ["train", "sync", BETWEEN]
    train = found["train"]
    assert (train.wall, train.times, train.busy) == (11.0, 2, 6.0)
    assert train.cpu == {
        "linear": (2.5, 1), "mm": (3.0, 1), "launch": (0.5, 1), "backward": (2.0, 1),
        OWN: (5.0, 2),
    }  # fmt: skip
    assert train.gpu == {"kernel a": (4.0, 1), "kernel b": (4.0, 1), "copy": (0.5, 1)}
    assert found["sync"].cpu == {OWN: (2.0, 1)} and found[BETWEEN].cpu == {"add": (1.0, 1)}


def test_the_table_names_the_longest_operations_and_adds_up_the_others():
    many = [event(f"op {i:02}", i * SECOND, (i + 1) * 1e3) for i in range(14)]
    text = table_of(
        "a title", phase_times([event("train", 0, 15e6, "user_annotation"), *many], PHASES)
    )
    lines = text.splitlines()
    assert lines[0] == "a title" and "GPU" not in text
    assert lines[3].split() == ["train", "1", "15.0000"]
    assert lines[5] == "train, CPU: 15.0000 s"
    assert lines[7].split(maxsplit=3)[3] == OWN
    assert lines[8].split() == ["0.0140", "0.1%", "1", "op", "13"]
    assert lines[-1].split() == ["0.0150", "0.1%", "5", "5", "others"]  # 1 to 5 ms
    assert "train, GPU: 8.5000 s" in table_of("", phase_times(TRACE, PHASES))


def test_a_profiled_step_leaves_a_trace_and_a_table_and_no_other_step_does(process, tmp_path):
    phases, left = Phases(torch.device("cpu")), []
    model = torch.nn.Linear(8, 8)
    conf = ProfileConf(steps=[2])
    for _ in profiled(range(3), conf, tmp_path, process, lambda: left.append("out")):
        with phases("generate"), torch.no_grad():
            model(torch.ones(4, 8))
        with phases("train"):
            wide = model(torch.ones(65_536, 8))  # so that it is among the operations that are named
            torch.nn.functional.silu(wide).sum().backward()
    folder = tmp_path / "profiles"
    assert sorted(path.name for path in folder.iterdir()) == [
        "step-2-rank-0.json.gz", "step-2-rank-0.txt",
    ]  # fmt: skip
    assert left == ["out"]
    trace = json.loads(gzip.decompress((folder / "step-2-rank-0.json.gz").read_bytes()))
    names = [e["name"] for e in trace["traceEvents"] if e.get("cat") == "user_annotation"]
    assert [name for name in names if name in PHASES] == ["generate", "train"]
    generate, train = (folder / "step-2-rank-0.txt").read_text().split("train, CPU")
    assert "aten::silu_backward" in train and "aten::silu_backward" not in generate


def test_a_rank_that_is_not_asked_for_writes_nothing_and_waits(process, tmp_path):
    left: list[int] = []
    steps = profiled(range(2), ProfileConf([1], rank=1), tmp_path, process, lambda: left.append(1))
    assert list(steps) == [0, 1]
    assert left == [1] and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (["profile.steps=[1,3]", "profile.rank=1"], []),
        (["profile.steps=[2,4]"],
         ["profile.steps=[2, 4]: the run ends with step 3; use steps 1 to 3"]),
        (["profile.rank=2"],
         ["profile.rank=2: the run has 2 ranks, counted from 0; use at most 1"]),
    ],
)  # fmt: skip
def test_steps_and_ranks_that_the_run_does_not_have_are_refused(words, refused):
    conf = load_conf(["conf=qwen3_tiny", "steps=3", *words])[1]
    assert profile_problems(conf, 2) == refused


def test_a_start_refuses_them(process):
    conf = load_conf(["conf=qwen3_tiny", "steps=3", "profile.steps=[3,9]", "profile.rank=1"])[1]
    with pytest.raises(Refusal) as refused:
        check(conf, process)
    lines = str(refused.value).splitlines()
    assert [line.split(":")[0] for line in lines[1:]] == [
        "- profile.steps=[3, 9]", "- profile.rank=1",
    ]  # fmt: skip
    with pytest.raises(Refusal, match=r"profile.steps=\[0\]: must be >= 1"):
        load_conf(["conf=qwen3_tiny", "profile.steps=[0]"])


def test_the_pace_leaves_a_step_out():
    now = [0.0]
    pace = Pace(10, now=lambda: now[0])
    for step, ended in ((1, 2.0), (2, 4.0), (3, 30.0)):  # the third one is profiled
        now[0] = ended
        pace.advance(step)
    now[0] = 60.0  # its trace is written
    pace.leave_out()
    assert pace.seconds_per_step() == 2.0 and pace.eta() == "0:14"
    now[0] = 63.0
    pace.advance(4)
    assert pace.seconds_per_step() == pytest.approx(7 / 3)


def test_the_pace_of_a_first_step_that_is_left_out_is_unknown():
    now = [0.0]
    pace = Pace(10, now=lambda: now[0])
    now[0] = 5.0
    pace.advance(1)
    pace.leave_out()
    assert pace.seconds_per_step() is None
    now[0] = 6.0
    pace.advance(2)
    assert pace.seconds_per_step() == 1.0
