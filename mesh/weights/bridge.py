"""The second crossing: the trainer's weights become the generator's, and that is proved.

Every rank of the world holds a `WeightBridge` and calls `sync` in lockstep. What a rank sends,
receives or copies follows from the plan, which all derive alike. Pieces are cast to the generator's
dtype as they are packed, so no more than a bucket of cast weights exists at a time.
`DTensor.redistribute` is not used: across meshes it raises, or returns the tensor still on the
source mesh.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from mesh.layout.holdings import Holding, agree, can_alias, describe, local_tensors
from mesh.layout.reshard import Copy, Message, ParamLayout, buckets, check_tiling, plan
from mesh.weights.digest import compare_digests, local_digests, total_digest

Verify = Literal["every", "first", "off"]
TRAINER, GENERATOR = "trainer", "generator"


@dataclass(frozen=True)
class SyncReport:
    """What one sync did; equal on all ranks except for `seconds`.

    `bytes_moved` counts what all ranks wrote, in the generator's dtypes; 0 where weights are
    aliased. `verified`: the digests of both sides were compared (a mismatch raises).
    """

    version: int
    bytes_moved: int
    seconds: float
    verified: bool


class WeightBridge:
    """Owns the plan from the trainer's layout to the generator's, and the weights' version.

    Made on every rank of the world at the same time. `source` and `destination` map names to this
    rank's tensors (DTensors stand for their local shards) and are empty off their role; where a
    rank's shard is empty it may be listed or not. A destination tensor has `dtype`, or the source's
    own dtype (a buffer that stays fp32). Names that share storage in the destination are written
    once, and digested each. `group` carries the weights (NCCL for CUDA tensors), `cpu_group` (gloo)
    the digests; both span the world. Raises `ValueError`, on all ranks alike, where names, shapes
    or dtypes do not fit.
    """

    def __init__(
        self,
        source: Mapping[str, Tensor],
        destination: Mapping[str, Tensor],
        source_layouts: Sequence[ParamLayout],
        destination_layouts: Sequence[ParamLayout],
        *,
        dtype: torch.dtype,
        group: dist.ProcessGroup,
        cpu_group: dist.ProcessGroup,
        verify: Verify = "every",
        bucket_bytes: int = 256 << 20,
        device: torch.device | str = "cpu",
        allow_alias: bool = True,
    ):
        self.version = 0
        self.source, self.destination = source, destination
        self.source_layouts, self.destination_layouts = source_layouts, destination_layouts
        self.group, self.cpu_group, self.verify = group, cpu_group, verify
        self.device, self.rank = torch.device(device), dist.get_rank()

        copies = plan(source_layouts, destination_layouts)
        for layout in destination_layouts:
            check_tiling(layout)
        trainer, generator = self._gather_holdings()
        source_dtypes, self.dtypes = agree(trainer, generator, dtype)
        plain = all(holding.plain for holding in (*trainer, *generator))
        self.aliased = allow_alias and can_alias(
            source_layouts, destination_layouts, source_dtypes, self.dtypes, plain
        )
        # a tied name is written through the first name of its storage
        copies = [copy for copy in copies if copy.name not in generator[copy.dst_rank].tied]
        copies = [] if self.aliased else copies
        itemsizes = {name: dtype.itemsize for name, dtype in self.dtypes.items()}
        self.local_copies = [c for c in copies if c.src_rank == c.dst_rank == self.rank]
        rounds = buckets(copies, itemsizes, bucket_bytes)
        self.sends = [[m for m in messages if m.src_rank == self.rank] for messages in rounds]
        self.receives = [[m for m in messages if m.dst_rank == self.rank] for messages in rounds]
        self.bytes_moved = sum(copy.numel * itemsizes[copy.name] for copy in copies)
        _warm_up(group, self.device)

    def aliases(self) -> dict[str, Tensor]:
        """The trainer's local tensors, for the engine to bind in place of its own (`aliased` only).

        Afterwards the engine's tensors go to `bind`.
        """
        assert self.aliased, "the layouts or dtypes of trainer and generator differ"
        return {name: tensor.detach() for name, tensor in local_tensors(self.source).items()}

    def bind(self, destination: Mapping[str, Tensor]) -> None:
        """Take the tensors that the engine holds now as the destination, in the layout of old."""
        assert destination.keys() == self.destination.keys(), "the engine changed its names"
        self.destination = destination

    @torch.no_grad()
    def sync(self) -> SyncReport:
        """Make the generator's weights the trainer's current ones. A collective over the world.

        Raises `RuntimeError` on all ranks, naming parameters and ranks, if the digests differ.
        """
        start = time.perf_counter()
        source, destination = local_tensors(self.source), local_tensors(self.destination)
        if self.aliased:
            _check_aliases(source, destination)
        for copy in self.local_copies:
            target = destination[copy.name][copy.destination.slices]
            target.copy_(source[copy.name][copy.source.slices])
        # one buffer each way for all rounds bounds memory, however far the host runs ahead
        outgoing, incoming = self._buffer(self.sends), self._buffer(self.receives)
        for sends, receives in zip(self.sends, self.receives, strict=True):
            packed, arriving = self._slots(sends, outgoing), self._slots(receives, incoming)
            for copy, slot in packed:
                slot.copy_(source[copy.name][copy.source.slices])  # casts as it copies
            self._exchange(sends, outgoing, receives, incoming)
            for copy, slot in arriving:
                destination[copy.name][copy.destination.slices].copy_(slot)
        self.version += 1
        verified = self.verify == "every" or (self.verify == "first" and self.version == 1)
        if verified:
            self._compare(source, destination)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return SyncReport(self.version, self.bytes_moved, time.perf_counter() - start, verified)

    def _buffer(self, rounds: Sequence[Sequence[Message]]) -> Tensor:
        """Room for the largest round, in bytes."""
        size = max((sum(map(self._num_bytes, messages)) for messages in rounds), default=0)
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def _num_bytes(self, message: Message) -> int:
        return sum(copy.slot_bytes(self.dtypes[copy.name].itemsize) for copy in message.copies)

    def _slots(self, messages: Sequence[Message], buffer: Tensor) -> list[tuple[Copy, Tensor]]:
        """Each copy of one round's messages with its place in the buffer, viewed in its shape."""
        slots, start = [], 0
        for copy in (copy for message in messages for copy in message.copies):
            dtype = self.dtypes[copy.name]
            slot = buffer[start : start + copy.numel * dtype.itemsize]
            slots.append((copy, slot.view(dtype).view(copy.source.size)))
            start += copy.slot_bytes(dtype.itemsize)
        return slots

    def _exchange(
        self,
        sends: Sequence[Message],
        outgoing: Tensor,
        receives: Sequence[Message],
        incoming: Tensor,
    ) -> None:
        """Move one round's messages, which lie one behind the other in the two buffers."""
        sizes = [list(map(self._num_bytes, messages)) for messages in (sends, receives)]
        out = zip(sends, outgoing[: sum(sizes[0])].split(sizes[0]), strict=True)
        into = zip(receives, incoming[: sum(sizes[1])].split(sizes[1]), strict=True)
        operations = [dist.P2POp(dist.isend, t, m.dst_rank, self.group) for m, t in out]
        operations += [dist.P2POp(dist.irecv, t, m.src_rank, self.group) for m, t in into]
        _run(operations)

    def _compare(self, source: Mapping[str, Tensor], destination: Mapping[str, Tensor]) -> None:
        tensors = {TRAINER: source, GENERATOR: destination}
        layouts = {TRAINER: self.source_layouts, GENERATOR: self.destination_layouts}
        mine = {
            side: local_digests(tensors[side], layouts[side], self.rank, self.dtypes)
            for side in layouts
        }
        by_side = {side: gather_digests(mine[side], layouts[side], self.cpu_group) for side in mine}
        ranks = range(dist.get_world_size())
        digests = [{side: by_side[side][rank] for side in by_side} for rank in ranks]
        findings = compare_digests(layouts, digests)
        if findings:
            shown = "\n  ".join(findings[:20] + ["..."] * (len(findings) > 20))
            raise RuntimeError(
                f"weights differ after sync {self.version} ({len(findings)} findings):\n  {shown}"
            )

    def _gather_holdings(self) -> tuple[list[Holding], list[Holding]]:
        """All ranks' holdings, by global rank, of the trainer's and of the generator's tensors."""
        mine = (
            describe(TRAINER, self.source, self.source_layouts, self.rank, self.device),
            describe(GENERATOR, self.destination, self.destination_layouts, self.rank, self.device),
        )
        pairs = [mine] * dist.get_world_size()
        dist.all_gather_object(pairs, mine, group=self.cpu_group)
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def gather_digests(
    digests: Mapping[str, int], layouts: Sequence[ParamLayout], cpu_group: dist.ProcessGroup
) -> list[dict[str, int]]:
    """All ranks' block digests, by global rank, then name. A collective over the gloo group."""
    names = [layout.name for layout in layouts]
    mine = torch.tensor([digests[name] for name in names], dtype=torch.int64)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine, group=cpu_group)
    return [dict(zip(names, row.tolist(), strict=True)) for row in gathered]


@torch.no_grad()
def weights_digest(
    tensors: Mapping[str, Tensor], layouts: Sequence[ParamLayout], cpu_group: dist.ProcessGroup
) -> str:
    """The metric `digest/weights`: hex digest of one role's tensors in their own dtype, the same on
    any mesh and on all ranks. A collective over the world; `tensors` is empty off the role."""
    mine = local_digests(local_tensors(tensors), layouts, dist.get_rank())
    return total_digest(layouts, gather_digests(mine, layouts, cpu_group))


def _check_aliases(source: Mapping[str, Tensor], destination: Mapping[str, Tensor]) -> None:
    moved = [name for name in source if source[name].data_ptr() != destination[name].data_ptr()]
    if moved:
        raise RuntimeError(
            f"aliased weights have storage of their own: {', '.join(moved)}; bind aliases() first"
        )


def _warm_up(group: dist.ProcessGroup, device: torch.device) -> None:
    """One element around the ring: NCCL wants all ranks of a group in its first P2P batch."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if world > 1:
        outgoing, incoming = torch.zeros(2, 1, device=device)
        send = dist.P2POp(dist.isend, outgoing, (rank + 1) % world, group)
        receive = dist.P2POp(dist.irecv, incoming, (rank - 1) % world, group)
        _run([send, receive])


def _run(operations: list[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(operations) if operations else []:
        work.wait()
