"""Weight sync: transfer of the trainer's weights to the generator, verified by digests.

Every rank of the world holds a `WeightBridge` and calls `sync` in lockstep. What a rank sends,
receives or copies follows from a plan that every rank derives. Pieces are cast to the generator's
dtype as they are packed, so at most one bucket of cast weights exists at a time.
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

from mesh.layout.holdings import Holding, can_alias, describe, local_tensors, resolve_dtypes
from mesh.layout.reshard import Copy, Message, ParamLayout, buckets, check_tiling, plan
from mesh.lifecycle.timers import Stopwatch
from mesh.weights.digest import compare_digests, local_digests, total_digest

Verify = Literal["every", "first", "off"]
TRAINER, GENERATOR = "trainer", "generator"


@dataclass(frozen=True)
class SyncReport:
    """Result of one sync; equal on all ranks except for its seconds.

    `bytes_moved`: written by all ranks, in the generator's dtypes; 0 if weights are aliased.
    `seconds`: of the whole sync; `transfer_seconds`: until this rank's copies and messages were
    done, with the wait for other ranks. `verified`: the digests of both sides were compared (a
    mismatch raises).
    """

    version: int
    bytes_moved: int
    seconds: float
    transfer_seconds: float
    verified: bool


class WeightBridge:
    """Owns the plan from the trainer's layout to the generator's, and the weight version.

    Constructed on every rank of the world together. `source` and `destination` map names to this
    rank's tensors (DTensors stand for their local shards) and are empty off their role; empty
    shards may be listed or left out. A destination tensor has `dtype`, or the source's own dtype (a
    buffer that stays fp32). Destination names that share storage are written once, and each is
    digested. `group` carries the weights (NCCL for CUDA tensors), `cpu_group` (gloo) the digests;
    both span the world. Raises `ValueError` on all ranks if names, shapes or dtypes do not match.
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
        source_dtypes, self.dtypes = resolve_dtypes(trainer, generator, dtype)
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

        Pass the engine's tensors to `bind` afterwards.
        """
        assert self.aliased, "the layouts or dtypes of trainer and generator differ"
        return {name: tensor.detach() for name, tensor in local_tensors(self.source).items()}

    def bind(self, destination: Mapping[str, Tensor]) -> None:
        """Make the engine's present tensors the destination; their layout is unchanged."""
        assert destination.keys() == self.destination.keys(), "the engine renamed parameters"
        self.destination = destination

    @torch.no_grad()
    def sync(self, instead: Mapping[str, Tensor] | None = None) -> SyncReport:
        """Copy the trainer's current weights to the generator. Collective over the world.

        instead: other tensors of the trainer in place of those of these names, of their shapes and
        dtypes; not where weights are aliased. Raises `RuntimeError` on all ranks, naming parameters
        and ranks, if the digests differ.
        """
        start, transfer = time.perf_counter(), Stopwatch(self.device)
        assert not (self.aliased and instead), "the generator has no weights of its own"
        given = {name: (instead or {}).get(name, own) for name, own in self.source.items()}
        source, destination = local_tensors(given), local_tensors(self.destination)
        if self.aliased:
            _check_aliases(source, destination)
        for copy in self.local_copies:
            target = destination[copy.name][copy.destination.slices]
            target.copy_(source[copy.name][copy.source.slices])
        # one buffer each way for all rounds bounds memory, even if the host runs ahead
        outgoing, incoming = self._buffer(self.sends), self._buffer(self.receives)
        for sends, receives in zip(self.sends, self.receives, strict=True):
            packed, arriving = self._slots(sends, outgoing), self._slots(receives, incoming)
            for copy, slot in packed:
                slot.copy_(source[copy.name][copy.source.slices])  # casts as it copies
            self._exchange(sends, outgoing, receives, incoming)
            for copy, slot in arriving:
                destination[copy.name][copy.destination.slices].copy_(slot)
        transfer.stop()
        self.version += 1
        verified = self.verify == "every" or (self.verify == "first" and self.version == 1)
        if verified:
            self._compare(source, destination)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        return SyncReport(self.version, self.bytes_moved, seconds, transfer.seconds(), verified)

    def _buffer(self, rounds: Sequence[Sequence[Message]]) -> Tensor:
        """Allocate the bytes of the largest round."""
        size = max((sum(map(self._num_bytes, messages)) for messages in rounds), default=0)
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def _num_bytes(self, message: Message) -> int:
        return sum(copy.slot_bytes(self.dtypes[copy.name].itemsize) for copy in message.copies)

    def _slots(self, messages: Sequence[Message], buffer: Tensor) -> list[tuple[Copy, Tensor]]:
        """Each copy of one round's messages with its slot in the buffer, viewed in its shape."""
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
        """Transfer one round's messages, stored back to back in the two buffers."""
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
                f"weights differ after sync {self.version} ({len(findings)} mismatches):\n  {shown}"
            )

    def _gather_holdings(self) -> tuple[list[Holding], list[Holding]]:
        """All ranks' holdings of the trainer's and of the generator's tensors, by global rank."""
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
    """All ranks' block digests, by global rank, then name. Collective over the gloo group."""
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
    any mesh and on all ranks. Collective over the world; `tensors` is empty off the role."""
    mine = local_digests(local_tensors(tensors), layouts, dist.get_rank())
    return total_digest(layouts, gather_digests(mine, layouts, cpu_group))


def _check_aliases(source: Mapping[str, Tensor], destination: Mapping[str, Tensor]) -> None:
    moved = [name for name in source if source[name].data_ptr() != destination[name].data_ptr()]
    if moved:
        raise RuntimeError(
            f"aliased weights no longer share storage: {', '.join(moved)}; bind aliases() first"
        )


def _warm_up(group: dist.ProcessGroup, device: torch.device) -> None:
    """Send one element around the ring: NCCL needs all ranks of a group in its first P2P batch."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if world > 1:
        outgoing, incoming = torch.zeros(2, 1, device=device)
        send = dist.P2POp(dist.isend, outgoing, (rank + 1) % world, group)
        receive = dist.P2POp(dist.irecv, incoming, (rank - 1) % world, group)
        _run([send, receive])


def _run(operations: list[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(operations) if operations else []:
        work.wait()
