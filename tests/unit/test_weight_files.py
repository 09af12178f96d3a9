"""Safetensors files of a model directory: damage is named by file before a tensor is read, and
weights in another form than ours are refused."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tiny_qwen3 import Variant, load_role, save_checkpoint

from mesh.config.schema import Conf, ModelConf
from mesh.model.families import shape_of_directory
from mesh.model.safetensors_files import INDEX, SINGLE, Stored, header_of
from mesh.model.weight_checks import weight_problems
from mesh.program.checks import model_problems

TIED, UNTIED = Variant(0, tied=True), Variant(1, tied=False)
TENSORS = {
    "a": torch.ones(2, 3),
    "b": torch.ones(4, dtype=torch.bfloat16),
    "c": torch.ones(0, 3),
    "d": torch.ones((), dtype=torch.float64),
}


def file_of(path, header, length=None, data=b"\0" * 40):
    """A safetensors file with this header, of that stated length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_the_header_of_an_intact_file(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    dtypes = {"a": "F32", "b": "BF16", "c": "F32", "d": "F64"}
    file = tmp_path / "x.safetensors"
    assert header_of(file) == {
        name: Stored(file, dtypes[name], tuple(x.shape)) for name, x in TENSORS.items()
    }


ALL = {"a": entry(), "b": entry("F16", (8,), (24, 40))}
DAMAGED = {
    "another dtype": (ALL | {"a": entry("F64")}, "entry of a has 24 bytes"),
    "another shape": (ALL | {"a": entry(shape=(2, 4))}, "which is not F32 of shape [2, 4]"),
    "an unknown dtype": (ALL | {"a": entry("F31")}, "entry of a has the unknown dtype 'F31'"),
    "a negative size": (ALL | {"a": entry(shape=(-2, -3))}, "entry of a has the shape [-2, -3]"),
    "a huge size": (ALL | {"a": entry(shape=(2**40, 2**40, 0))}, "entry of a has the shape"),
    "a fraction": (ALL | {"a": entry(shape=(2.0, 3))}, "entry of a has the shape [2.0, 3]"),
    "a true": (ALL | {"a": entry(shape=(True, 6))}, "entry of a has the shape [True, 6]"),
    "backward": (ALL | {"a": entry(offsets=(24, 0))}, "entry of a has -24 bytes"),
    "negative offsets": (ALL | {"a": entry(offsets=(-24, 0))}, "has data_offsets [-24, 0]"),
    "one offset": (ALL | {"a": entry(offsets=(24,))}, "entry of a has data_offsets [24]"),
    "an overlap": (ALL | {"b": entry("F16", (8,), (16, 32))}, "b begins at byte 16 of the data"),
    "a hole": (ALL | {"b": entry("F16", (4,), (32, 40))}, "b begins at byte 32 of the data"),
    "too much data": ({"a": entry()}, "bytes instead of "),
    "past the end": (ALL | {"c": entry("F16", (8,), (40, 56))}, "bytes instead of "),
    "no shape": (ALL | {"a": {"dtype": "F32", "data_offsets": [0, 24]}}, "entry of a lacks"),
    "no entry": (ALL | {"a": None}, "entry of a lacks dtype, shape or data_offsets"),
    "metadata": (ALL | {"__metadata__": {"step": 3}}, "has a __metadata__ that is not all text"),
    "a list": ([], "the header of x.safetensors is not a JSON object"),
    "no JSON": (b"{" * 30, "the header of x.safetensors is not JSON"),
    "deep": (b'{"a":' * 100_000, "the header of x.safetensors is not JSON"),
    "empty": (b"", "is not a safetensors file, or is truncated"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_header_that_contradicts_itself_is_named_by_file(tmp_path, case):
    header, wrong = DAMAGED[case]
    file = file_of(tmp_path / "x.safetensors", header)
    with pytest.raises(ValueError) as error:
        header_of(file)
    assert "x.safetensors" in str(error.value) and wrong in str(error.value)


@pytest.mark.parametrize("length", [-1, 2**63, 100_000_001])
def test_a_length_of_the_header_that_is_not_in_the_file(tmp_path, length):
    file = file_of(tmp_path / "x.safetensors", ALL, length % 2**64)
    with pytest.raises(ValueError, match="x.safetensors is not a safetensors file"):
        header_of(file)


VALUES = [None, 0, 1, -1, 3, 6, 24, 32, 2**64, 10**30, 1.5, True, "F32", "F16", "I8", "F4", "C64",
          "F8_E4M3", "F6_E2M3", "X", [], [0], [2, 3], [3, 2], [-2, -3], [0, 24], {}]  # fmt: skip


def changed(header, draw):
    """The header with one field of one tensor changed, left out or added."""
    header = json.loads(json.dumps(header))
    name = draw.choice([name for name in header if name != "__metadata__"])
    field = draw.choice(["dtype", "shape", "data_offsets", "more"])
    value = draw.choice(VALUES)
    old = header[name].get(field)
    if isinstance(old, list) and old and draw.random() < 0.7:
        old[draw.randrange(len(old))] = value
    elif draw.random() < 0.1:
        header[name].pop(field, None)
    else:
        header[name][field] = value
    return header


def test_a_header_passes_exactly_where_the_library_takes_it(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    whole = (tmp_path / "x.safetensors").read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    draw, seen = random.Random(0), Counter()
    for _ in range(1500):
        file = tmp_path / "changed.safetensors"
        file_of(file, changed(json.loads(whole[8:size]), draw), data=whole[size:])
        try:
            with safe_open(file, "pt") as handle:
                theirs = {k: tuple(handle.get_slice(k).get_shape()) for k in handle.keys()}  # noqa: SIM118
        except SafetensorError:
            theirs = None
        try:
            ours = {name: tensor.shape for name, tensor in header_of(file).items()}
        except ValueError as error:
            assert "changed.safetensors" in str(error)
            ours = None
        assert ours == theirs, file.read_bytes()[8:size]
        seen[theirs is None] += 1
    assert seen[True] > 500 and seen[False] > 100


@pytest.fixture
def sharded(tmp_path):
    save_checkpoint(tmp_path, UNTIED, max_shard_size="60KB")
    return tmp_path


def index_problems(path, **places):
    """Problems of a sharded directory whose index places tensors elsewhere."""
    index = json.loads((path / INDEX).read_text())
    index["weight_map"] |= places
    (path / INDEX).write_text(json.dumps(index))
    return weight_problems(path, shape_of_directory(path))


OUTSIDE = ["../x.safetensors", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "a\0b", None, 3, ["a"]]


@pytest.mark.parametrize("place", OUTSIDE, ids=repr)
def test_an_index_that_names_anything_but_a_file_beside_it_is_refused(sharded, place):
    """Also where the file exists and is intact."""
    save_file(TENSORS, sharded.parent / "x.safetensors")
    assert index_problems(sharded, **{"lm_head.weight": place}) == [
        f"{INDEX} places lm_head.weight in {place!r}, which is not the name of a file beside it"
    ]


def test_files_may_be_links_as_in_the_cache_of_hugging_face(sharded, solo_mesh):
    blobs = sharded.parent / "blobs"
    blobs.mkdir()
    for file in sharded.glob("*.safetensors"):
        file.rename(blobs / file.name)
        file.symlink_to(f"../blobs/{file.name}")
    assert weight_problems(sharded, shape_of_directory(sharded)) == []
    load_role(sharded, solo_mesh)


def test_an_index_that_disagrees_with_the_files(sharded):
    files = sorted({x.name for x in sharded.glob("*.safetensors")})
    of_head = json.loads((sharded / INDEX).read_text())["weight_map"]["lm_head.weight"]
    other = next(name for name in files if name != of_head)
    wrong = f"{INDEX} places lm_head.weight in {other}, which does not hold it"
    assert index_problems(sharded, **{"lm_head.weight": other}) == [wrong]
    more = f"{wrong} (and 1 more disagree)"
    assert index_problems(sharded, **{"zzz.weight": of_head}) == [more]


def test_a_tensor_in_two_files_and_one_that_the_index_leaves_out(sharded):
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    tensors = load_file(second)
    save_file(tensors | {"extra": torch.ones(2)}, second, metadata={"format": "pt"})
    assert index_problems(sharded) == [f"{INDEX} leaves out extra, which is in {second.name}"]
    twice = next(iter(load_file(first)))
    save_file(tensors | {twice: torch.ones(2)}, second, metadata={"format": "pt"})
    assert index_problems(sharded) == [f"{twice} is in {first.name} and again in {second.name}"]


WQ, HEAD, EMBEDDING = (
    "model.layers.1.self_attn.q_proj.weight", "lm_head.weight", "model.embed_tokens.weight",
)  # fmt: skip


def problems_of(path, variant, change, **keys):
    """What a start refuses in a checkpoint whose tensors were changed."""
    save_checkpoint(path, variant)
    tensors = load_file(path / SINGLE)
    change(tensors)
    save_file(tensors, path / SINGLE, metadata={"format": "pt"})
    model = ModelConf(path=str(path), tokenizer="package:characters", **keys)
    lines = model_problems(Conf(model=model), shape_of_directory(path))
    assert all(line.startswith(f"model.path={path}: ") for line in lines)
    return [line.removeprefix(f"model.path={path}: ") for line in lines]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float64, torch.int8], ids=str)
def test_weights_that_fp32_does_not_hold_or_that_need_a_scale_are_refused(tmp_path, dtype):
    (line,) = problems_of(tmp_path, UNTIED, lambda t: t.update({WQ: t[WQ].to(dtype)}))
    name = {torch.float8_e4m3fn: "F8_E4M3", torch.float64: "F64", torch.int8: "I8"}[dtype]
    assert line.startswith(
        f"dtypes that are not read (only F32, F16, BF16 are): {WQ} {name} (model.safetensors); "
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_short_floats_are_read_exactly(tmp_path, solo_mesh, dtype):
    assert problems_of(tmp_path, UNTIED, lambda t: t.update({WQ: t[WQ].to(dtype)})) == []
    model, _ = load_role(tmp_path, solo_mesh)
    stored = load_file(tmp_path / SINGLE)[WQ]
    assert stored.dtype == dtype
    assert torch.equal(model.layers["1"].attention.qkv_linear.wq.weight, stored.float())


def test_tensors_that_nobody_asks_for_are_listed_unless_they_are_ignored(tmp_path):
    scales = {f"model.layers.{n}.mlp.up_proj.weight_scale": torch.ones(1) for n in range(2)}
    extra = scales | {f"score.{name}": torch.ones(3, 2) for name in ("bias", "mean", "weight")}
    (line,) = problems_of(tmp_path, UNTIED, lambda t: t.update(extra))
    first = "model.layers.0.mlp.up_proj.weight_scale F32 [1], "
    assert line.startswith(f"tensors that the model of config.json does not have: {first}")
    assert "score.mean F32 [3, 2] and 1 more (if" in line
    assert "model.ignore_tensors=[model.layers.0.mlp.up_proj.weight_scale,model.layers.1." in line
    kept = problems_of(
        tmp_path, UNTIED, lambda t: t.update(extra), ignore_tensors=["score.*", next(iter(scales))]
    )
    assert len(kept) == 1 and "score" not in kept[0] and "layers.0" not in kept[0]
    ignored = ["score.*", "*.weight_scale"]
    assert problems_of(tmp_path, UNTIED, lambda t: t.update(extra), ignore_tensors=ignored) == []


def test_frequencies_of_an_old_export_are_computed_not_read(tmp_path):
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(12)}
    assert problems_of(tmp_path, UNTIED, lambda t: t.update(old)) == []


def test_a_copy_of_a_tied_head_is_redundant(tmp_path, solo_mesh, monkeypatch):
    monkeypatch.setattr("mesh.model.weight_checks.COMPARED_BYTES", 10_000)  # a few rows at once
    assert problems_of(tmp_path, TIED, lambda t: t.update({HEAD: t[EMBEDDING].clone()})) == []
    load_role(tmp_path, solo_mesh)


@pytest.mark.parametrize("row", [0, 95])
def test_a_tied_head_with_values_of_its_own_is_refused(tmp_path, monkeypatch, row):
    """`transformers` does not tie it then, whatever config.json says."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("mesh.model.weight_checks.COMPARED_BYTES", 10_000)

    def change(tensors):
        tensors[HEAD] = tensors[EMBEDDING].clone()
        tensors[HEAD][row, 3] += 0.5

    (line,) = problems_of(tmp_path, TIED, change)
    assert line.startswith(f"{HEAD} is not {EMBEDDING}, though config.json has tie_word_embeddings")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not torch.equal(theirs.lm_head.weight, theirs.model.embed_tokens.weight)
    assert problems_of(tmp_path, TIED, change, ignore_tensors=[HEAD]) == []


def test_an_adapter_beside_the_weights_is_not_passed_over(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (line,) = problems_of(tmp_path, UNTIED, lambda tensors: None)
    assert line.startswith("adapter_config.json: adapters are not applied")
