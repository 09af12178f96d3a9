"""When the generator may use the trainer's storage."""

import torch

from mesh.layout.reshard import Block, ParamLayout
from mesh.weights.bridge import can_alias


def test_can_alias_wants_the_same_blocks_ranks_dtypes_and_plain_storage():
    def layout(rank: int, rows: int) -> list[ParamLayout]:
        return [ParamLayout("w", (4,), {rank: Block((0,), (rows,))})]

    fp32, bf16 = {"w": torch.float32}, {"w": torch.bfloat16}
    assert can_alias(layout(0, 4), layout(0, 4), fp32, fp32, plain=True)
    assert not can_alias(layout(0, 4), layout(1, 4), fp32, fp32, plain=True)
    assert not can_alias(layout(0, 4), layout(0, 2), fp32, fp32, plain=True)
    assert not can_alias(layout(0, 4), layout(0, 4), fp32, bf16, plain=True)
    assert not can_alias(layout(0, 4), layout(0, 4), fp32, fp32, plain=False)
