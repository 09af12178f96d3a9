"""The table of engines: a row for every choice of the schema, and what each row promises."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from typing import get_args

import pytest

from mesh.config.keys import conf_keys
from mesh.config.schema import Conf, GeneratorConf, MeshConf, VllmConf
from mesh.engine.kinds import (
    KINDS,
    NATIVE,
    REFERENCE,
    VLLM_NATIVE,
    VLLM_TITAN,
    exact_problems,
    kind_of,
    page_problems,
    without_release,
)
from mesh.roles.generator import engine_settings


def conf_of(engine: str, model: str = "titan", **keys) -> Conf:
    return Conf(engine=engine, vllm=VllmConf(model=model), **keys)


def test_every_choice_of_the_schema_has_one_row_and_every_row_is_a_choice():
    engines, models = (get_args(conf_keys()[name].annotation) for name in ("engine", "vllm.model"))
    found = {choice: kind_of(conf_of(*choice)) for choice in product(engines, models)}
    assert found == {
        ("native", "titan"): NATIVE,
        ("native", "native"): NATIVE,
        ("vllm", "titan"): VLLM_TITAN,
        ("vllm", "native"): VLLM_NATIVE,
    }
    assert set(found.values()) == set(KINDS)


def test_the_reference_can_do_what_is_asked_of_it():
    assert REFERENCE.exact and REFERENCE.runs_policy


def test_captured_graphs_never_have_the_trainers_storage():
    """They hold addresses: after a sync they would go on with the first weights."""
    cases = list(product(("cpu", "cuda"), (False, True)))
    aliases = {kind: [kind.may_alias(*case) for case in cases] for kind in KINDS}
    assert aliases == {
        NATIVE: [True, True, True, True],  # it captures after the storage was bound
        VLLM_TITAN: [True, True, True, False],
        VLLM_NATIVE: [False, False, False, False],
    }


def test_memory_is_released_where_the_trainer_shares_the_gpu():
    split = MeshConf(mode="split")
    for model in ("titan", "native"):
        conf = conf_of("vllm", model)
        assert engine_settings(conf, "cuda").releases
        assert not engine_settings(conf, "cpu").releases
        assert not engine_settings(without_release(conf), "cuda").releases
        assert conf.vllm.release, "the configuration that was given is as it was"
        assert not engine_settings(conf_of("vllm", model, mesh=split), "cuda").releases
    assert not engine_settings(conf_of("native"), "cuda").releases


@pytest.mark.parametrize(
    ("conf", "cpu", "cuda"),
    [
        (conf_of("native"), 16, 256),
        (conf_of("vllm"), 16, 256),
        (conf_of("vllm", "native"), 32, 16),
        (conf_of("native", generator=GeneratorConf(page_size=48)), 48, 48),
    ],
)
def test_pages_have_a_default_that_the_engine_takes(conf, cpu, cuda):
    assert engine_settings(conf, "cpu").page_size == cpu
    assert engine_settings(conf, "cuda").page_size == cuda


@pytest.mark.parametrize(
    ("kind", "device", "size", "expected"),
    [
        (NATIVE, "cpu", 7, None),
        (NATIVE, "cuda", 300, "the CUDA attention kernel wants a multiple of 256; use 512, or 0"),
        (VLLM_TITAN, "cuda", 256, None),
        (VLLM_TITAN, "cpu", 7, None),
        (VLLM_NATIVE, "cpu", 48, "vLLM's attention wants a multiple of 32; use 64, or 0"),
        (VLLM_NATIVE, "cuda", 48, None),
        (VLLM_NATIVE, "cuda", 24, "vLLM's attention wants a multiple of 16; use 32, or 0"),
    ],
)
def test_a_page_size_that_the_kernel_does_not_take_is_refused(kind, device, size, expected):
    conf = Conf(generator=GeneratorConf(page_size=size))
    message = f"generator.page_size={size}: {expected} for the default"
    assert page_problems(conf, kind, device) == ([] if expected is None else [message])


def test_exactness_is_refused_where_the_engine_cannot_give_it_and_names_those_that_can():
    conf = Conf(batch_invariant=True)
    assert exact_problems(conf, NATIVE) == exact_problems(conf, VLLM_TITAN) == []
    assert exact_problems(Conf(), VLLM_NATIVE) == []
    assert exact_problems(conf, VLLM_NATIVE) == [
        "vllm.model=native: its kernels round differently from the trainer's, so it cannot be "
        "exact; use engine=native, engine=vllm vllm.model=titan, or batch_invariant=false"
    ]


def test_a_program_that_builds_no_vllm_does_not_import_it_nor_set_its_environment():
    code = (
        "import os, sys, mesh.program.assembly, mesh.exactness.engines\n"
        "print([m for m in sys.modules if m.partition('.')[0] == 'vllm'])\n"
        "print([name for name in os.environ if name.startswith('VLLM_')])\n"
    )
    command = [sys.executable, "-c", code]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    made = subprocess.run(command, env=clean, capture_output=True, text=True, check=True)
    assert made.stdout.split("\n")[:2] == ["[]", "[]"]
