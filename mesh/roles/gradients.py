"""The reduction of gradients: over passes and waves, and over the ranks of the trainer.

One seam. FSDP sums over passes in `.grad` and over ranks in its reduce-scatter, in fp32 and without
dividing (`mesh/model/policy.py`); the trainer only asks for the whole step's sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from mesh.layout.holdings import local_tensors
from mesh.model.parallel import tp_dims
from mesh.model.policy import Policy


def summed_gradients(model: Policy) -> dict[str, Tensor]:
    """This rank's shards of the step's gradient, by parameter; zeros where nothing was trained on.

    They are the parameters' own gradients: the optimizer sees changes made in place.
    """
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return local_tensors(
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    )


def gradient_norm(
    gradients: Mapping[str, Tensor], bad: Tensor, model: Policy, mesh: DeviceMesh
) -> tuple[float, bool]:
    """2-norm of the whole gradient, each element counted once, whatever replicates it, and whether
    the step is finite; NaN where the gradient is not. All ranks of the trainer get the same answer.
    The norm is 0 only where every element is: float64 holds the smallest float32 squared.

    bad: float64 scalar, above 0 where this rank's loss or logprobs are not finite.
    """
    dims, first_tp = tp_dims(model, mesh["tp"].size()), mesh.get_local_rank("tp") == 0
    total, copies = torch.zeros(2, dtype=torch.float64, device=bad.device)
    for name, gradient in gradients.items():
        counts = first_tp or dims[name] is not None
        (total if counts else copies).add_(gradient.double().square().sum())
    # times 0: 0 for what is finite, NaN for all else, that of copies and replicas too
    both = torch.stack([total + copies * 0, bad])
    for axis in ("dp_shard", "tp"):
        dist.all_reduce(both, group=mesh.get_group(axis))
    seen = torch.stack([both[0] * 0, both[1]])
    dist.all_reduce(seen, group=mesh.get_group("dp_replicate"))
    norm, count = torch.stack([(both[0] + seen[0]).sqrt(), seen[1]]).tolist()
    return norm, math.isfinite(norm) and count == 0
