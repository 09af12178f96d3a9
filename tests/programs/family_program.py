"""Our model of a random Seed-OSS checkpoint against `transformers`: `family_program.py DIRECTORY`.

Run with the `mesh` of docs/extending.md, to which the page's patch was applied.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_qwen3 import Variant, load_role, packed, random_sequences, save_checkpoint
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig

import mesh.model.families
from mesh.layout.meshes import AXES
from mesh.model.families import config_entries, shape_of_directory

UNDROPPED = {"attention_dropout": 0.0, "residual_dropout": 0.0}
SEED_OSS = Variant(family="seed_oss", tied=False, others=UNDROPPED)
SIZES = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 16,
    "intermediate_size": 80,
}  # fmt: skip


@torch.no_grad()
def compare_logprobs(path: Path) -> None:
    alone = DeviceMesh("cpu", torch.zeros(1, 1, 1, dtype=torch.int64), mesh_dim_names=AXES)
    theirs = save_checkpoint(path, SEED_OSS)
    ours, shape = load_role(path, alone)
    (tokens,) = random_sequences([40])
    logprobs_A = packed([tokens]).scores(ours).logprobs_A
    expected_LV = torch.log_softmax(theirs(torch.tensor([tokens])).logits[0], -1)
    expected_A = expected_LV[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    torch.testing.assert_close(logprobs_A, expected_A, rtol=0, atol=1e-5)
    (path / "config.json").write_text(json.dumps(config_entries(shape, (2,))))
    assert shape_of_directory(path) == shape
    assert AutoConfig.from_pretrained(path).attention_bias


def compare_defaults(path: Path) -> None:
    entries = SIZES | UNDROPPED | {"model_type": "seed_oss", "attention_bias": True}
    (path / "config.json").write_text(json.dumps(entries))
    shape, theirs = shape_of_directory(path), AutoConfig.from_pretrained(path)
    assert (shape.head_dim, shape.num_kv_heads) == (theirs.head_dim, theirs.num_key_value_heads)
    assert (shape.max_positions, shape.pad_id) == (
        theirs.max_position_embeddings,
        theirs.pad_token_id,
    )


def main(folder: Path) -> None:
    assert Path(mesh.model.families.__file__).is_relative_to(folder), "another mesh was imported"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    compare_logprobs(folder / "seed_oss")
    compare_defaults(folder / "seed_oss")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
