"""Layouts: the plan of every mode, what is refused, and the meshes of real processes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.config.schema import Conf, GeneratorConf, MeshConf, TrainerConf
from mesh.layout.meshes import (
    Layout,
    Parallelism,
    layout_problems,
    plan_layout,
    resolve_device,
)
from mesh.types import ModelShape

TINY = ModelShape(128, 128, 2, 4, 4, 32, 384)


def conf_of(
    mode: str = "colocated",
    trainer: tuple[int, int | None, int] = (1, None, 1),
    generator: tuple[int | None, int] = (None, 1),
    **keys: int,
) -> Conf:
    """A configuration with trainer (dp_replicate, dp_shard, tp) and generator (dp, tp)."""
    replicate, shard, tp = trainer
    return Conf(
        mesh=MeshConf(mode=mode),  # type: ignore[arg-type]
        trainer=TrainerConf(dp_replicate=replicate, dp_shard=shard, tp=tp),
        generator=GeneratorConf(dp=generator[0], tp=generator[1]),
        **keys,  # type: ignore[arg-type]
    )


def shapes(layout: Layout) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    return layout.trainer.shape, layout.generator.shape


@pytest.mark.parametrize(
    ("world", "trainer", "generator", "expected"),
    [
        (1, (1, None, 1), (None, 1), ((1, 1, 1), (1, 1, 1))),
        (4, (1, None, 1), (None, 1), ((1, 4, 1), (4, 1, 1))),
        (4, (1, None, 2), (None, 4), ((1, 2, 2), (1, 1, 4))),
        (8, (2, None, 2), (None, 2), ((2, 2, 2), (4, 1, 2))),
        (8, (2, 4, 1), (8, 1), ((2, 4, 1), (8, 1, 1))),
    ],
)
def test_colocated_fills_the_world(world, trainer, generator, expected):
    layout = plan_layout(conf_of("colocated", trainer, generator), world)
    assert shapes(layout) == expected
    assert layout.trainer_ranks == layout.generator_ranks == tuple(range(world))


@pytest.mark.parametrize(
    ("world", "trainer", "generator", "expected"),
    [
        # both unset: the generator takes at most half
        (2, (1, None, 1), (None, 1), ((1, 1, 1), (1, 1, 1))),
        (3, (1, None, 1), (None, 1), ((1, 2, 1), (1, 1, 1))),
        (5, (1, None, 1), (None, 2), ((1, 3, 1), (1, 1, 2))),
        (8, (1, None, 2), (None, 4), ((1, 2, 2), (1, 1, 4))),
        # half does not fit the trainer's degrees: the next smaller generator that does
        (6, (1, None, 4), (None, 1), ((1, 1, 4), (2, 1, 1))),
        # no generator of at most half fits: the smallest larger one
        (3, (1, None, 1), (None, 2), ((1, 1, 1), (1, 1, 2))),
        # the trainer's size is given
        (4, (1, 3, 1), (None, 1), ((1, 3, 1), (1, 1, 1))),
        (4, (1, 1, 1), (None, 1), ((1, 1, 1), (3, 1, 1))),
        (8, (2, 1, 2), (None, 2), ((2, 1, 2), (2, 1, 2))),
        # the generator's size is given
        (4, (1, None, 1), (1, 1), ((1, 3, 1), (1, 1, 1))),
        (8, (1, None, 2), (1, 2), ((1, 3, 2), (1, 1, 2))),
        # both are
        (4, (1, 2, 1), (1, 2), ((1, 2, 1), (1, 1, 2))),
    ],
)
def test_split_gives_the_trainer_the_first_ranks(world, trainer, generator, expected):
    layout = plan_layout(conf_of("split", trainer, generator), world)
    assert shapes(layout) == expected
    assert layout.trainer_ranks == tuple(range(layout.trainer.size))
    assert layout.generator_ranks == tuple(range(layout.trainer.size, world))


OTHER = "or start another number of processes"


@pytest.mark.parametrize(
    ("conf", "world", "lines"),
    [
        (
            conf_of("split"),
            1,
            [
                "mesh.mode=split: a world of 1 cannot be split into trainer ranks in multiples of "
                "1 (trainer.dp_replicate x trainer.tp) and generator ranks in multiples of 1 "
                "(generator.tp); start e.g. 2 processes, or set mesh.mode=colocated"
            ],
        ),
        (
            conf_of("split", (1, 4, 1)),
            4,
            [
                "trainer.dp_shard=4: the trainer takes 4 of 4 ranks and leaves the generator none; "
                "lower it, or start 5 processes"
            ],
        ),
        (
            conf_of("split", generator=(2, 4)),
            4,
            [
                "generator.dp=2: the generator takes 8 of 4 ranks and leaves the trainer none; "
                "lower it, or start 9 processes"
            ],
        ),
        (
            conf_of("split", (1, 2, 1), (1, 1)),
            4,
            [f"generator.dp=1: makes 1 rank, but the generator has 2; set generator.dp=2, {OTHER}"],
        ),
        (
            conf_of("colocated", (1, 2, 1), (None, 4)),
            6,
            [
                "trainer.dp_shard=2: makes 2 ranks, but the trainer has 6; "
                f"set trainer.dp_shard=6, {OTHER}",
                "generator.tp=4: does not divide the generator's 6 ranks; use a divisor of 6, "
                f"{OTHER}",
            ],
        ),
        (
            conf_of("colocated", (4, None, 1), num_prompts=6),
            6,
            [
                "trainer.dp_replicate=4: does not divide the trainer's 6 ranks; use a divisor of "
                f"6, {OTHER}"
            ],
        ),
        (
            conf_of("colocated", (2, None, 2), num_prompts=6),
            6,
            [
                "trainer.tp=2: times trainer.dp_replicate=2 does not divide the trainer's 6 ranks; "
                f"use degrees whose product divides 6, {OTHER}"
            ],
        ),
        (
            conf_of("split", (1, 1, 1), (None, 2)),
            2,
            [
                "generator.tp=2: does not divide the generator's 1 rank; use a divisor of 1, "
                f"{OTHER}"
            ],
        ),
        (
            conf_of("colocated", (2, 1, 2)),
            6,
            [
                "trainer.dp_shard=1: makes 4 ranks, but the trainer has 6; "
                f"choose other degrees, {OTHER}"
            ],
        ),
        (
            conf_of("colocated", (1, None, 3), (None, 3), num_prompts=6),
            3,
            [
                "trainer.tp=3: does not divide the model's 4 heads, 4 kv heads, 128 vocabulary "
                "entries; choose one of 1, 2, 4",
                "generator.tp=3: does not divide the model's 4 heads, 4 kv heads, 128 vocabulary "
                "entries; choose one of 1, 2, 4",
            ],
        ),
        (
            conf_of("split", (1, 3, 1), waves=2),
            5,
            [
                "num_prompts=64: is not a multiple of 12, which waves=2, 3 data-parallel ranks of "
                "the trainer and 2 of the generator require; use 60 or 72"
            ],
        ),
        (
            conf_of("colocated", num_prompts=2),
            4,
            [
                "num_prompts=2: is not a multiple of 4, which waves=1, 4 data-parallel ranks of "
                "the trainer and 4 of the generator require; use 4"
            ],
        ),
        (
            conf_of("colocated", (1, None, 0), group_size=1),
            4,
            [
                "group_size=1: must be >= 2; the default is 8",
                "trainer.tp=0: must be >= 1; the default is 1",
            ],
        ),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(conf: Conf, world: int, lines: list[str]):
    assert layout_problems(conf, world, TINY) == lines


def test_a_layout_that_fits_has_no_problems():
    assert layout_problems(conf_of("split", (1, 2, 1), (None, 2)), 4, TINY) == []
    assert layout_problems(conf_of("colocated", (1, None, 4), (None, 2)), 4, TINY) == []


def test_without_training_a_batch_need_not_divide_but_a_layout_must_fit():
    conf = conf_of("colocated", num_prompts=64)
    assert len(layout_problems(conf, 3, TINY)) == 1
    assert layout_problems(conf, 3, TINY, training=False) == []
    (line,) = layout_problems(conf_of("split"), 1, TINY, training=False)
    assert line.startswith("mesh.mode=split: a world of 1")


def test_without_a_shape_only_the_model_is_left_out():
    conf = conf_of("colocated", (1, None, 3), (3, 1), num_prompts=4)
    assert layout_problems(conf, 3, TINY)[:-1] == layout_problems(conf, 3, None) != []


degrees = st.integers(0, 4)
unset_or_degree = st.none() | degrees


@settings(max_examples=400, deadline=None)
@given(
    mode=st.sampled_from(["colocated", "split"]),
    trainer=st.tuples(degrees, unset_or_degree, degrees),
    generator=st.tuples(unset_or_degree, degrees),
    world=st.integers(1, 16),
)
def test_a_plan_uses_every_rank_once_and_as_asked(mode, trainer, generator, world):
    conf = conf_of(mode, trainer, generator)
    try:
        layout = plan_layout(conf, world)
    except ValueError:
        assert layout_problems(conf, world, None)
        return
    replicate, shard, tp = layout.trainer.shape
    assert (replicate, tp) == (trainer[0], trainer[2]) and trainer[1] in (None, shard)
    assert generator[0] in (None, layout.generator.dp) and layout.generator.tp == generator[1]
    assert layout.trainer.size == len(layout.trainer_ranks) > 0
    assert layout.generator.size == len(layout.generator_ranks) > 0
    used = layout.trainer_ranks + layout.generator_ranks
    times = 2 if mode == "colocated" else 1
    assert sorted(used) == sorted(list(range(world)) * times)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 16))
def test_a_split_is_refused_only_where_no_sizes_fit(trainer_tp, generator_tp, world):
    conf = conf_of("split", (1, None, trainer_tp), (None, generator_tp))
    possible = any(
        size % trainer_tp == 0 and (world - size) % generator_tp == 0 for size in range(1, world)
    )
    if possible:
        assert plan_layout(conf, world).trainer.size % trainer_tp == 0
    else:
        with pytest.raises(ValueError, match="mesh.mode=split"):
            plan_layout(conf, world)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp", "wrong"),
    [
        (8, 1, 8, None),  # a kv head may have several ranks
        (8, 2, 4, None),
        (8, 4, 2, None),
        (12, 3, 4, "3 kv heads; choose one of 1"),
        (9, 3, 2, "9 heads, 3 kv heads; choose one of 1"),
        (4, 1, 8, "4 heads; choose one of 1, 2, 4"),
        (12, 6, 4, "6 kv heads; choose one of 1, 2"),
        (12, 2, 8, "12 heads; choose one of 1, 2, 4"),
    ],
)
def test_ranks_have_whole_heads_and_may_share_kv_heads(heads, kv_heads, tp, wrong):
    shape = replace(TINY, num_heads=heads, num_kv_heads=kv_heads)
    problems = layout_problems(conf_of("colocated", (1, None, tp), num_prompts=8), 8, shape)
    expected = [] if wrong is None else [f"trainer.tp={tp}: does not divide the model's {wrong}"]
    assert problems == expected


def test_parallelism_counts():
    parallelism = Parallelism(dp_replicate=2, dp_shard=3, tp=4)
    assert (parallelism.dp, parallelism.size, parallelism.shape) == (6, 24, (2, 3, 4))


def test_device_auto_is_what_torch_finds():
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("cuda") == "cuda"
    assert resolve_device(Conf().device) == ("cuda" if torch.cuda.is_available() else "cpu")
