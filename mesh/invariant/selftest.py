"""Start-up self-test: each row of the model's matrix products must be independent of the other
rows and columns, on this machine.

Vendor libraries do not guarantee it, so it is checked bit for bit before anything is built. A shape
that fails on any rank moves to our kernels on all ranks and is checked again; if it still fails,
the run stops. PyTorch's softmax stays only for the widths that pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from mesh.invariant.switch import use_fallback, use_ordinary_softmax

ROWS_TRIED = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 100, 129, 257)
MORE_ROWS_ON_CUDA = (512, 1000, 4096, 16384)
ROWS_OF_SHARDS = (1, 17)
SOFTMAX_ROWS = 4096  # at most: fp32 rows of a whole vocabulary tile take gigabytes

Comparison = tuple[str, torch.Tensor, torch.Tensor]
"""(description, result, expected result)"""

Comparisons = Iterator[Comparison]


class Product(NamedTuple):
    """A linear layer as a matrix product. sharded: its outputs are split over tp ranks, into at
    most so many `parts` (None: as many as there are ranks)."""

    inputs: int
    outputs: int
    name: str
    sharded: bool = True
    parts: int | None = None


class Finding(NamedTuple):
    """Outcome of the comparisons of one product, or of one softmax over `inputs`.

    first: description of the first mismatch.
    """

    product: Product
    comparisons: int
    differing: int
    first: str


def check_products(
    products: Sequence[Product], degrees: Sequence[int], dtype: torch.dtype, device: torch.device
) -> list[Finding]:
    """Compare row slices, and column shards of every tp degree, with the whole product.

    Products with the same (K, N) share a finding, their names joined. The switch must be on.
    """
    return [_finding(p, _slices(p, degrees, dtype, device)) for p in _distinct(products)]


def check_softmax(widths: Sequence[int], device: torch.device) -> list[Finding]:
    """Compare row slices of fp32 softmax and log_softmax with the whole."""
    return [
        _finding(Product(width, width, "softmax"), _softmax_slices(width, device))
        for width in sorted(set(widths))
    ]


def self_test(
    products: Sequence[Product],
    softmax_widths: Sequence[int],
    degrees: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    group: dist.ProcessGroup,
    others: Iterable[Comparison] = (),
) -> str:
    """Run all comparisons, move failing shapes to our kernels, and repeat, since a moved shape may
    be another layer's shard. Returns a one-line summary.

    others: comparisons of operations without a fallback kernel. Raises RuntimeError naming what
    depends on the batch even with our kernels, or if ranks differ in their number of CPU threads,
    on which sums depend. Collective over `group`: all its ranks make the same choices.
    """
    _check_thread_counts(device, group)
    rest = worst_over_ranks([_finding(Product(0, 0, "other operations"), others)], group)
    _refuse([finding for finding in rest if finding.differing], device)
    moved: list[Product] = []
    widths = set(softmax_widths)
    comparisons = rest[0].comparisons
    while True:
        use_ordinary_softmax(widths)
        linears = worst_over_ranks(check_products(products, degrees, dtype, device), group)
        softmaxes = worst_over_ranks(check_softmax(softmax_widths, device), group)
        comparisons += sum(finding.comparisons for finding in [*linears, *softmaxes])
        wrong = [finding for finding in [*linears, *softmaxes] if finding.differing]
        if not wrong:
            return _report(comparisons, len(linears) + len(softmaxes), moved)
        _refuse([finding for finding in wrong if finding.product in moved], device)
        moved += [finding.product for finding in wrong]
        failed = [finding.product for finding in linears if finding.differing]
        use_fallback((p.inputs, outputs) for p in failed for outputs in shard_sizes(p, degrees))
        widths -= {finding.product.inputs for finding in softmaxes if finding.differing}


def worst_over_ranks(findings: list[Finding], group: dist.ProcessGroup) -> list[Finding]:
    """Each finding from the rank with the most mismatches; equal on every rank. Collective."""
    everywhere: list[list[Finding]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(everywhere, findings, group=group)
    return [max(same, key=lambda x: x.differing) for same in zip(*everywhere, strict=True)]


def shard_sizes(product: Product, degrees: Sequence[int]) -> list[int]:
    """Output features per rank at every tp degree, unsharded first."""
    counts = {1, *degrees} if product.sharded else {1}
    most = product.parts or max(counts)
    return [product.outputs // count for count in sorted({min(d, most) for d in counts})]


def _distinct(products: Sequence[Product]) -> list[Product]:
    alike: dict[Product, list[str]] = {}
    for p in products:
        alike.setdefault(p._replace(name=""), []).append(p.name)
    return [p._replace(name=", ".join(names)) for p, names in alike.items()]


def _finding(product: Product, compared: Iterable[Comparison]) -> Finding:
    comparisons, wrong = 0, []
    for what, result, expected in compared:
        comparisons += 1
        if not torch.equal(result, expected):
            wrong.append(what)
    return Finding(product, comparisons, len(wrong), wrong[0] if wrong else "")


def _rows_tried(device: torch.device) -> tuple[int, ...]:
    return ROWS_TRIED + (MORE_ROWS_ON_CUDA if device.type == "cuda" else ())


def _row_slices(tried: Sequence[int]) -> Iterator[slice]:
    """Slices of the largest row count: at the start, an odd offset, the middle and the end."""
    most = max(tried)
    for rows in tried:
        for first in sorted({0, min(5, most - rows), (most - rows) // 2, most - rows}):
            yield slice(first, first + rows)


def _slices(
    product: Product, degrees: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Comparisons:
    x, weight = operands(product, max(_rows_tried(device)), dtype, device)
    whole = F.linear(x, weight)
    for part in _row_slices(_rows_tried(device)):
        yield f"rows {part.start} to {part.stop}", F.linear(x[part], weight), whole[part]
    for size in shard_sizes(product, degrees)[1:]:
        for first in range(0, product.outputs, size):
            columns = slice(first, first + size)
            for rows in (len(x), *ROWS_OF_SHARDS):
                shard = F.linear(x[:rows], weight[columns])
                yield f"outputs {first} to {first + size}", shard, whole[:rows, columns]


def operands(
    product: Product, rows: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, K] and weight [N, K] whose terms cancel in pairs, at random positions.

    Only rounding errors remain of each sum, so another order of summation shows in almost every
    element, also in bfloat16, where rounding the result would otherwise hide it.
    """
    draw = torch.Generator(device).manual_seed(0)
    half, odd = divmod(product.inputs, 2)
    order = torch.randperm(product.inputs, generator=draw, device=device)
    x, weight = (
        torch.randn(size, half, generator=draw, device=device, dtype=dtype)
        for size in (rows, product.outputs)
    )
    pairs = (
        (x, x, x.new_zeros(len(x), odd)),
        (weight, -weight, weight.new_zeros(len(weight), odd)),
    )
    x, weight = (torch.cat(parts, 1)[:, order] for parts in pairs)
    return x, weight


def _softmax_slices(width: int, device: torch.device) -> Comparisons:
    draw = torch.Generator(device).manual_seed(0)
    tried = [rows for rows in _rows_tried(device) if rows <= SOFTMAX_ROWS]
    logits = 4 * torch.randn(max(tried), width, generator=draw, device=device)
    for name, function in (("softmax", F.softmax), ("log_softmax", F.log_softmax)):
        whole = function(logits, dim=-1)
        for rows in _row_slices(tried):
            part = function(logits[rows], dim=-1)
            yield f"{name} of rows {rows.start} to {rows.stop}", part, whole[rows]


def _check_thread_counts(device: torch.device, group: dist.ProcessGroup) -> None:
    if device.type != "cpu":
        return
    counts: list[int] = [0] * dist.get_world_size(group)
    dist.all_gather_object(counts, torch.get_num_threads(), group=group)
    if len(set(counts)) > 1:
        raise RuntimeError(
            f"batch_invariant=true: ranks have {min(counts)} to {max(counts)} CPU threads, and "
            "sums depend on that number; set the same OMP_NUM_THREADS on all hosts"
        )


def _describe(product: Product) -> str:
    if not product.inputs:
        return product.name
    return f"{product.name} [K {product.inputs}, N {product.outputs}]"


def _refuse(findings: list[Finding], device: torch.device) -> None:
    if not findings:
        return
    lines = [
        f"{_describe(f.product)}: {f.differing} of {f.comparisons} differ, first: {f.first}"
        for f in findings
    ]
    remedy = "on the CPU try OMP_NUM_THREADS=1" if device.type == "cpu" else "use a Hopper GPU"
    raise RuntimeError(
        "batch_invariant=true: on this machine results depend on the batch, even with fixed-tile "
        f"kernels; {remedy}, or set batch_invariant=false\n" + "\n".join(lines)
    )


def _report(comparisons: int, shapes: int, moved: list[Product]) -> str:
    names = ", ".join(map(_describe, moved))
    line = f"batch-invariant: {comparisons:,} comparisons of {shapes} shapes bitwise equal"
    return line + (f"; moved to our own kernels: {names}" if moved else "")
