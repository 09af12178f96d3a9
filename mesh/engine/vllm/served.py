"""The trained model in a vLLM of its own: `vllm serve DIR`, `LLM(model=DIR)`.

vLLM starts the processes, schedules, reads the files and samples. The model is the one that a run's
generator has, over the same paged cache. Its logits are its logprobs: both differ by one number for
each row, so vLLM draws from the same distribution, and `serving` has vLLM report them unchanged.
Whoever asks for logprobs gets the bits of training.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.logger import init_logger

from mesh.config.keys import problem, refuse
from mesh.engine.choice import whole_logprobs
from mesh.engine.vllm.serving import COMPLETE, Serving, served_shape, serving_of
from mesh.engine.vllm.titan import PagedPolicy
from mesh.invariant.switch import batch_invariant, current
from mesh.layout.holdings import local_tensors
from mesh.model.families import hf_names
from mesh.model.layouts import role_layouts
from mesh.model.policy import build_policy, named_weights
from mesh.model.products import self_test_of

logger = init_logger("vllm.mesh")  # a name for which vLLM prints

THREADS = (
    "Sums on a CPU depend on the number of threads, and there are %d here: the bits are those of a "
    "run with as many. A run has 1 for each process: set OMP_NUM_THREADS=1 "
    "VLLM_CPU_OMP_THREADS_BIND=nobind."
)

_process = ExitStack()
"""Holds the batch-invariance switch, which stays on until the process ends."""


class ServedModel(PagedPolicy):
    """The policy of a Hugging Face directory. Its weights are vLLM's loader's to bring."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config, tp = vllm_config.model_config, get_tp_group()
        serving, shape = serving_of(vllm_config), served_shape(config)
        device = torch.device(vllm_config.device_config.device)
        with torch.device("cpu"):  # where vLLM builds models, tensors are made on the GPU
            if serving.batch_invariant:
                switch_on(serving, device.type)
                found = self_test_of(shape, serving.chunks, config.dtype, device, tp.cpu_group)
                if tp.is_first_rank:
                    report(found, device.type)
            mesh = DeviceMesh.from_group(tp.device_group, device.type, mesh_dim_names=("tp",))
            policy = build_policy(shape, config.max_model_len, device, config.dtype, mesh)
            grid = torch.tensor(tp.ranks).view(1, 1, -1)
            layouts = role_layouts(shape, config.max_model_len, grid, fsdp=False)
        group = tp.device_group if tp.world_size > 1 else None
        super().__init__(policy.eval().requires_grad_(False), shape, group, vllm_config)
        self.serving, self.directory = serving, config.model
        self.layouts = {layout.name: layout for layout in layouts}

    def compute_logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """Logprobs of every id at the temperature of training, fp32 [S, V], on every rank."""
        temperature = self.serving.temperature
        return whole_logprobs(self.head(hidden_SD), temperature, self.group, self.shape.textless)

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Copy this rank's blocks of whole weights by Hugging Face's names, in its own dtype.

        Returns vLLM's names of what was written. Raises a Refusal that lists the weights that were
        not, or whose shape is another.
        """
        mine, rank = local_tensors(named_weights(self.policy)), dist.get_rank()
        theirs = hf_names(list(mine), self.shape)
        unwritten, other = set(mine), []
        for name, tensor in weights:
            for ours in (ours for ours in mine if theirs[ours] == name):
                layout = self.layouts[ours]
                if tuple(tensor.shape) != layout.shape:
                    other.append(f"{name} is {list(tensor.shape)} and not {list(layout.shape)}")
                    continue
                mine[ours].copy_(tensor[layout.blocks[rank].slices])
                unwritten.discard(ours)
        missing = sorted({theirs[ours] for ours in unwritten})
        wrong = [f"weights were left uninitialised: {', '.join(missing)}"] if missing else []
        refuse([problem("model", self.directory, line, COMPLETE) for line in other or wrong])
        return {f"policy.{ours}" for ours in mine}


def report(found: str, device_type: str) -> None:
    """Log what the self-test found, and what it cannot know: the threads of training."""
    logger.info(found)
    if device_type == "cpu" and torch.get_num_threads() > 1:
        logger.warning(THREADS, torch.get_num_threads())


def switch_on(serving: Serving, device_type: str) -> None:
    """Make this process batch-invariant, as training was."""
    switch = current()
    if switch is None:
        _process.enter_context(batch_invariant(True, device_type, serving.chunks))
    elif switch.chunks != serving.chunks:
        wrong = f"another model of this process is served with {switch.chunks}"
        found = problem("invariant.chunks", serving.chunks, wrong, "use one process for each")
        refuse([found])
