"""Our model of a random Llama checkpoint against `transformers`: `family_program.py DIRECTORY`.

Run with the `mesh` of docs/extending.md, to which the page's patch was applied.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_qwen3 import load_role, packed, random_sequences
from torch.distributed.device_mesh import DeviceMesh
from transformers import LlamaConfig, LlamaForCausalLM

import mesh.model.families
from mesh.layout.meshes import AXES
from mesh.model.families import config_entries


def llama(path: Path) -> LlamaForCausalLM:
    """Write a random checkpoint to `path` and return `transformers`' model of it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=24, intermediate_size=80, initializer_range=0.2,
        max_position_embeddings=128,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(path)
    return model


@torch.no_grad()
def main(folder: Path) -> None:
    assert Path(mesh.model.families.__file__).is_relative_to(folder), "another mesh was imported"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    alone = DeviceMesh("cpu", torch.zeros(1, 1, 1, dtype=torch.int64), mesh_dim_names=AXES)
    theirs = llama(folder / "llama")
    ours, shape = load_role(folder / "llama", alone)
    (tokens,) = random_sequences([40])
    logprobs_A = packed([tokens]).scores(ours).logprobs_A
    expected_LV = torch.log_softmax(theirs(torch.tensor([tokens])).logits[0], -1)
    expected_A = expected_LV[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    torch.testing.assert_close(logprobs_A, expected_A, rtol=0, atol=1e-5)
    written = json.loads(json.dumps(config_entries(shape, (2,))))
    read = json.loads((folder / "llama" / "config.json").read_text())
    assert {key: read[key] for key in ("model_type", "architectures")} == {
        key: written[key] for key in ("model_type", "architectures")
    }
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
