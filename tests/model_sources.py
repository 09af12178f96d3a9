"""Model directories as people have them, and their exports by a run that starts from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from chat_tokenizer import CHATML, END_OF_TEXT, IM_END, saved
from safetensors.torch import load_file, save_file
from tiny_qwen3 import Variant, load_role, save_checkpoint
from torch.distributed.device_mesh import DeviceMesh

from mesh.config.loading import load_conf
from mesh.model.exported import Export
from mesh.model.families import shape_of_directory
from mesh.model.hf import export
from mesh.model.policy import named_weights
from mesh.program.plan import export_plan
from mesh.text.template import TEMPLATE_FOLDER
from mesh.text.tokenizer import load_tokenizer
from mesh.types import ModelShape

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
FAMILIES = {  # name: checkpoint, and entries in forms of their own
    "qwen3": (Variant(5, head_dim=32), {"rope_scaling": {"type": "default", "rope_theta": 3e4}}),
    "qwen2": (
        Variant(6, tied=False, dim=128, family="qwen2", head_dim=None),
        {"rope_theta": 3e4, "use_sliding_window": False, "max_window_layers": 7},
    ),
    "llama": (
        Variant(7, kv_heads=1, dim=128, family="llama", head_dim=None),
        {"rope_theta": 3e4, "rope_scaling": LLAMA3, "pretraining_tp": 1},
    ),
    "mistral": (
        Variant(8, tied=False, family="mistral", head_dim=32),
        {"rope_theta": 3e4, "sliding_window": None},
    ),
}
ENTRIES = {
    "_name_or_path": "acme/one",
    "initializer_range": 0.03,
    "rope_parameters": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": False,
}
GENERATION = {"do_sample": True, "temperature": 0.6, "top_k": 20, "transformers_version": "4.51.0"}
TOOL_USE = "{{ tools }}"


def source(
    path: Path, dtype: torch.dtype = torch.bfloat16, family: str = "qwen3", **entries: object
) -> Path:
    """A directory as people have them: weights of `dtype`, entries of its own, two templates."""
    variant, forms = FAMILIES[family]
    save_checkpoint(path, replace(variant, vocab_size=112))
    tensors = load_file(path / "model.safetensors")
    save_file({n: x.to(dtype) for n, x in tensors.items()}, path / "model.safetensors")
    saved(path, CHATML, file=True)
    (path / TEMPLATE_FOLDER).mkdir()
    (path / TEMPLATE_FOLDER / "tool_use.jinja").write_text(TOOL_USE)
    config = json.loads((path / "config.json").read_text()) | ENTRIES | forms | entries
    del config["dtype"]
    (path / "config.json").write_text(json.dumps(config))
    ends = {"eos_token_id": [IM_END, END_OF_TEXT]}
    (path / "generation_config.json").write_text(json.dumps(GENERATION | ends))
    return path


def planned(path: Path, *words: str) -> tuple[ModelShape, Export]:
    """(shape, plan of the exports) of a run that starts from a directory."""
    _, conf = load_conf(["conf=qwen3_tiny", f"model.path={path}", *words])
    shape = shape_of_directory(path, conf.model.ignore_config)
    return shape, export_plan(conf, shape, load_tokenizer(path, path))


def exported(path: Path, target: Path, mesh: DeviceMesh, *words: str) -> Path:
    """The model of a directory, exported as a run that starts from it would."""
    shape, plan = planned(path, *words)
    export(target, named_weights(load_role(path, mesh)[0]), shape, plan, write=True)
    return target
