"""Speed and memory of a step, of what its ranks measured: waits, sync rate, MFU, timeline lines."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch

from mesh.layout.meetings import meetings_of
from mesh.layout.meshes import Layout, Parallelism
from mesh.lifecycle.memory import resident_gb
from mesh.lifecycle.timers import Measured, Phases
from mesh.model.flops import peak_of, train_flops
from mesh.runs.metrics import line_of
from mesh.runs.speed import mfu_metrics, phase_metrics, speed_metrics, sync_metrics
from mesh.runs.timeline import log_timeline, record_of, role_of
from mesh.types import ModelShape

SPLIT = Layout(
    "split", 4, Parallelism(1, 2, 1), Parallelism(1, 1, 2), trainer_ranks=(0, 1),
    generator_ranks=(2, 3),
)  # fmt: skip
ALONE = Layout("colocated", 1, Parallelism(1, 1, 1), Parallelism(1, 1, 1), (0,), (0,))


def measured(
    *events: tuple[str, object, list[tuple[float, float]]], **gauges: list[float]
) -> Measured:
    """Of phases, each with its meeting and the times of every rank."""
    names, meetings, times = zip(*events, strict=True)
    return Measured(names, meetings, list(zip(*times, strict=True)), gauges)


MEETINGS = meetings_of(SPLIT)
STEP = measured(
    ("generate", (), [(0, 0), (0, 0), (0, 3), (0, 3.5)]),
    ("exchange", MEETINGS.exchange, [(0, 4), (0.5, 4), (3, 3.25), (3.5, 3.5)]),
    ("exchange", MEETINGS.flush, [(4, 4), (4, 4), (3.25, 3.75), (3.5, 5)]),
    ("train", MEETINGS.passes, [(4, 6), (4.5, 6), (5, 5), (5, 5)]),
    ("sync", MEETINGS.sync, [(6, 8), (6.5, 8), (5, 8), (5, 8)]),
    **{"sync/gb": [4.0] * 4, "sync/seconds": [1.75, 1.0, 2.75, 2.5]},
)


def test_seconds_are_the_slowest_ranks():
    assert STEP.seconds() == {
        "generate": 3.5, "exchange": 4.0, "train": 2.0, "sync": 3.0,
    }  # fmt: skip


def test_a_rank_waits_until_the_last_one_it_needs_is_ready_and_no_longer_than_its_phase():
    """The replica's first rank, 2, speaks for it; rank 3 flushes until the trainer is at it."""
    assert STEP.waits() == [
        [0, 3, 0, 0.5, 0.5],
        [0, 2.5, 0, 0, 0],
        [0, 0, 0.5, 0, 1.5],
        [0, 0, 0.5, 0, 1.5],
    ]


def test_a_rank_that_is_alone_waits_for_nobody():
    meetings = meetings_of(ALONE)
    events = [("train", meetings.passes, [(0, 1)]), ("sync", meetings.sync, [(1, 2)])]
    assert measured(*events).waits() == [[0, 0]]
    replicated = Layout("colocated", 4, Parallelism(2, 2, 1), Parallelism(4, 1, 1), *[range(4)] * 2)
    assert [tuple(map(tuple, one)) for one in meetings_of(replicated).passes] == [
        ((0, 1), (0, 1)), ((2, 3), (2, 3)),
    ]  # fmt: skip


def test_the_sync_is_timed_from_when_all_ranks_were_ready():
    """Rank 0 has the longest transfer without its wait: 1.75 - 0.5 s."""
    assert sync_metrics(STEP) == {"sync/gb": 4.0, "sync/gb_per_second": 4.0 / 1.25}
    nothing = {"sync/gb": [0.0], "sync/seconds": [0.1]}
    assert sync_metrics(measured(("sync", (), [(0, 1)]), **nothing)) == {"sync/gb": 0.0}
    assert sync_metrics(measured(("train", (), [(0, 1)]))) == {}


def test_operations_of_a_model_whose_numbers_are_worked_out_by_hand():
    """dim 4, 2 heads and 1 kv head of 3, feed-forward 5, vocabulary 7, two layers.

    Weights of a layer: q 4*6, k and v 4*3 each, o 6*4, feed-forward 3*4*5: 132. Pairs of queries
    and keys: 1 for the sequence of 1 token, 3 for that of 2.
    """
    shape = ModelShape(7, 4, 2, num_heads=2, num_kv_heads=1, head_dim=3, ffn_dim=5)
    layer = 6 * 132 * 3 + 12 * 6 * 4
    assert train_flops(shape, [1, 2], 1) == 2 * layer + 6 * 4 * 7 * 1
    assert train_flops(shape, [], 0) == 0


def test_operations_of_qwen3_0_6b():
    """440M weights in its layers, 156M in its head, 16384 pairs * 12 * 2048 * 28 of attention."""
    shape = ModelShape(151936, 1024, 28, 16, 8, 128, 3072)
    per_token = train_flops(shape, [1], 1)
    assert per_token == pytest.approx(6 * (440.4e6 + 155.6e6) + 28 * 12 * 2048, rel=1e-3)


def test_peaks_of_gpus_by_the_names_that_torch_gives_them():
    peaks = {
        "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 835e12,
        "NVIDIA H200": 989e12, "NVIDIA GH200 480GB": 989e12, "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA A100 80GB PCIe": 312e12, "NVIDIA B200": 2250e12,
    }  # fmt: skip
    assert {name: peak_of(name) for name in peaks} == peaks
    for unknown in ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA H20", "NVIDIA RTX A1000"):
        assert math.isnan(peak_of(unknown))


def test_mfu_is_of_all_the_trainers_gpus_and_left_out_where_a_peak_is_unknown():
    def of(peaks: list[float], flops: list[float]) -> dict[str, float]:
        gauges = {"peak_flops": peaks, "flops": flops}
        return mfu_metrics(measured(("train", (), [(0, 2)] * 2), **gauges), 2.0)

    assert of([100.0, 100.0], [60.0, 20.0]) == {"mfu/train": 0.2}
    assert of([100.0, 0.0], [60.0, 0.0]) == {"mfu/train": 0.3}  # the other one generates
    assert of([math.nan, 100.0], [60.0, 20.0]) == {}
    assert of([math.nan, math.nan], [60.0, 20.0]) == {}
    assert of([100.0, 100.0], [0.0, 0.0]) == {}


def test_speed_metrics_of_a_step():
    gauges = {"host_gb": [1.0, 3.0], "gpu_gb/train": [5.0, 4.0], "flops": [8.0, 0.0],
              "peak_flops": [2.0, 2.0]}  # fmt: skip
    found = speed_metrics(measured(("train", (), [(0, 4), (0, 1)]), **gauges), {
        "tokens/trained": 100.0, "tokens/generated": 7.0,
    })  # fmt: skip
    assert found == {
        "seconds/train": 4.0, "tokens_per_second/train": 25.0, "host_gb": 3.0,
        "gpu_gb/train": 5.0, "mfu/train": 0.5,
    }  # fmt: skip


def test_phase_metrics():
    assert phase_metrics({"generate": 2.0, "sync": 0.5}, {"generate": 100}) == {
        "seconds/generate": 2.0,
        "seconds/sync": 0.5,
        "tokens_per_second/generate": 50.0,
    }


def test_a_line_of_the_timeline_has_every_rank_and_counts_from_the_first_of_them():
    events = [("train", MEETINGS.passes, [(100.5, 102), (101, 102), (100.25, 100.3), (101, 101)])]
    assert json.loads(line_of(record_of(7, measured(*events), SPLIT))) == {
        "step": 7,
        "began": 100.25,
        "ranks": [
            {"rank": 0, "role": "trainer", "events": [["train", 0.25, 1.75, 0.5]]},
            {"rank": 1, "role": "trainer", "events": [["train", 0.75, 1.75, 0.0]]},
            {"rank": 2, "role": "generator", "events": [["train", 0.0, 0.05, 0.0]]},
            {"rank": 3, "role": "generator", "events": [["train", 0.75, 0.75, 0.0]]},
        ],
    }
    assert role_of(0, ALONE) == "both"


def test_lines_of_the_timeline_are_appended_and_a_step_without_phases_has_none(tmp_path):
    for step, found in ((1, STEP), (2, STEP), (3, Phases(torch.device("cpu")).measured())):
        log_timeline(tmp_path, step, found, SPLIT)
    lines = (tmp_path / "timeline.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_phases_are_events_by_the_clock_and_gauges_start_over():
    phases, before = Phases(torch.device("cpu")), time.time()
    phases.gauge("x", 3.0)
    with phases("generate"):
        time.sleep(0.02)
    with phases("train", MEETINGS.passes):
        time.sleep(0.01)
    with phases("generate", host=True):
        pass
    found = phases.measured()
    assert list(found.names) == ["generate", "train", "generate"]
    assert found.meetings == [(), MEETINGS.passes, ()]
    times = [moment for pair in found.times_RE[0] for moment in pair]
    assert before - 0.01 < times[0] and times == sorted(times) and times[-1] < time.time() + 0.01
    assert 0.02 <= times[1] - times[0] < 0.2 and 0.01 <= times[3] - times[2] < 0.2
    assert found.gauges == {"x": [3.0]}
    assert phases.measured().gauges == {}


def test_resident_memory_is_that_of_this_process():
    before = resident_gb()
    if before is None:
        pytest.skip("the system does not say it")
    block = torch.ones(50_000_000)  # 0.2 GB
    assert 0.19 < resident_gb() - before < 0.3 and block.numel() == 50_000_000
