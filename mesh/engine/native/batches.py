"""The scheduled work as tensors: spans of prefill, and the rows of a decode step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from mesh.engine.base import Row, num_pages
from mesh.engine.native.cache import Sequence
from mesh.engine.native.scheduler import Fill
from mesh.engine.sampler import token_keys
from mesh.model.attention import AttentionContext, KVCache
from mesh.types import Sampling

Inputs = tuple[torch.Tensor, torch.Tensor, AttentionContext]
"""(tokens_T, positions_T, context): the model's arguments."""

KEY, TOKEN, POSITION, TABLE = 0, 1, 2, 3  # columns of a decode row; the page table is the rest


@dataclass(frozen=True)
class Span:
    """Tokens of a fill that one forward pass computes; `start` are in the cache before them."""

    tokens: tuple[int, ...]
    start: int
    fill: Fill

    @property
    def pages(self) -> list[int]:
        return self.fill.pages

    @property
    def rows(self) -> list[Row]:
        positions = range(self.start, self.start + len(self.tokens))
        return [(self.fill.prompt_id, self.fill.sample_id, p) for p in positions]


def spans_of(fills: list[Fill], limit: int) -> Iterator[list[Span]]:
    """Cut fills, in order, into batches of at most `limit` tokens, within a prompt too."""
    batch: list[Span] = []
    room = limit
    for fill in fills:
        done = 0
        while done < len(fill.tokens):
            piece = fill.tokens[done : done + room]
            batch.append(Span(piece, fill.start + done, fill))
            done += len(piece)
            room -= len(piece)
            if room == 0:
                yield batch
                batch, room = [], limit
    if batch:
        yield batch


def prefill_inputs(spans: list[Span], cache: KVCache, device: torch.device) -> Inputs:
    """The model's inputs for a batch of spans."""
    page_size = cache.page_size
    sizes = np.array([len(span.tokens) for span in spans])
    lengths = sizes + [span.start for span in spans]
    width = num_pages(int(lengths.max()), page_size)
    table = np.array([(span.pages + [0] * width)[:width] for span in spans])
    positions = np.concatenate([np.arange(s.start, s.start + len(s.tokens)) for s in spans])
    owner = np.repeat(np.arange(len(spans)), sizes)
    slots = table[owner, positions // page_size] * page_size + positions % page_size

    def tensor(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(values).to(dtype).to(device)

    context = AttentionContext(
        cu_seqlens=tensor(np.concatenate([[0], sizes.cumsum()]), torch.int32),
        lengths=tensor(lengths, torch.int32),
        max_query=int(sizes.max()),
        max_length=int(lengths.max()),
        cache=cache,
        block_table=tensor(table, torch.int32),
        slots_T=tensor(slots, torch.int64),
    )
    tokens = np.concatenate([np.array(span.tokens) for span in spans])
    return tensor(tokens, torch.int64), tensor(positions, torch.int64), context


def slot_copies(
    copies: list[tuple[int, int, int]], page_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Flat slots (sources, targets) of page copies (source page, target page, tokens)."""
    pairs = [
        (np.arange(tokens) + source * page_size, np.arange(tokens) + target * page_size)
        for source, target, tokens in copies
    ]
    sources, targets = zip(*pairs, strict=True)
    return np.concatenate(sources), np.concatenate(targets)


def decode_rows(running: list[Sequence], sampling: Sampling, page_size: int) -> torch.Tensor:
    """One row per running sequence, int64 [S, TABLE + pages], with everything that a decode step
    needs, so that it reaches the device in one transfer.
    """
    positions = np.array([s.length - 1 for s in running])
    width = int(positions.max()) // page_size + 1
    rows = np.zeros((len(running), TABLE + width), dtype=np.int64)
    rows[:, TOKEN] = [s.last_token for s in running]
    rows[:, POSITION] = positions
    for row, sequence in zip(rows, running, strict=True):
        row[TABLE : TABLE + len(sequence.pages)] = sequence.pages
    ids_S2 = torch.tensor([(s.prompt_id, s.sample_id) for s in running])
    drawn_S = torch.tensor([len(s.tokens) for s in running])
    rows[:, KEY] = token_keys(sampling, ids_S2, drawn_S).numpy()
    return torch.from_numpy(rows)


def decode_inputs(rows_SX: torch.Tensor, cache: KVCache) -> Inputs:
    """The model's inputs for a decode step, computed on the device of `rows_SX`.

    A row of zeros reads and writes page 0 only: it pads a batch.
    """
    page_size = cache.page_size
    positions_S, table = rows_SX[:, POSITION], rows_SX[:, TABLE:]
    page_S = table.gather(1, (positions_S // page_size)[:, None])[:, 0]
    context = AttentionContext(
        cu_seqlens=torch.arange(len(rows_SX) + 1, dtype=torch.int32, device=rows_SX.device),
        lengths=(positions_S + 1).int(),
        max_query=1,
        max_length=table.shape[1] * page_size,
        cache=cache,
        block_table=table.int(),
        slots_T=page_S * page_size + positions_S % page_size,
    )
    return rows_SX[:, TOKEN].contiguous(), positions_S.contiguous(), context
