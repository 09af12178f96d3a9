"""The start-up self-test: on this machine, is a row of the model's own products the same whatever
rows and columns are computed with it?

What vendor libraries promise nowhere is compared, bit for bit, before anything is built. A shape
that fails on any rank is moved to our kernels on all, and compared again; if it fails there too,
the run stops. Likewise the ordinary softmax, which stays in place for the widths that pass.
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
SOFTMAX_ROWS = 4096  # at most: in fp32 and of a whole vocabulary tile they take gigabytes

Comparison = tuple[str, torch.Tensor, torch.Tensor]
"""What was computed, its result, and what that has to be."""

Compared = Iterator[Comparison]


class Product(NamedTuple):
    """A linear layer as a matrix product. sharded: tensor-parallel ranks cut its outputs."""

    inputs: int
    outputs: int
    name: str
    sharded: bool = True


class Finding(NamedTuple):
    """What the comparisons of a product, or of a softmax over `inputs`, came to.

    first: the first that differed, in words.
    """

    product: Product
    comparisons: int
    differing: int
    first: str


def check_products(
    products: Sequence[Product], degrees: Sequence[int], dtype: torch.dtype, device: torch.device
) -> list[Finding]:
    """Row slices, and column shards of every tensor-parallel degree, against the whole product.

    Products of one (K, N) share a finding, their names joined. The switch must be on.
    """
    return [_finding(p, _slices(p, degrees, dtype, device)) for p in _distinct(products)]


def check_softmax(widths: Sequence[int], device: torch.device) -> list[Finding]:
    """Row slices of softmax and log_softmax in fp32 against the whole."""
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
    """Compare, move what fails to our kernels, and compare all again, since a shape may be another
    layer's shard. Returns a line that says what was done.

    others: comparisons of what has no second kernel. Raises RuntimeError naming what depends on the
    batch with our kernels too, or ranks whose numbers of CPU threads differ, as sums follow it. A
    collective of `group`: all its ranks come to the same choices.
    """
    _refuse_other_threads(device, group)
    rest = over_ranks([_finding(Product(0, 0, "other operations"), others)], group)
    _refuse([finding for finding in rest if finding.differing], device)
    moved: list[Product] = []
    widths = set(softmax_widths)
    comparisons = rest[0].comparisons
    while True:
        use_ordinary_softmax(widths)
        linears = over_ranks(check_products(products, degrees, dtype, device), group)
        softmaxes = over_ranks(check_softmax(softmax_widths, device), group)
        comparisons += sum(finding.comparisons for finding in [*linears, *softmaxes])
        wrong = [finding for finding in [*linears, *softmaxes] if finding.differing]
        if not wrong:
            return _report(comparisons, len(linears) + len(softmaxes), moved)
        _refuse([finding for finding in wrong if finding.product in moved], device)
        moved += [finding.product for finding in wrong]
        failed = [finding.product for finding in linears if finding.differing]
        use_fallback((p.inputs, outputs) for p in failed for outputs in shard_sizes(p, degrees))
        widths -= {finding.product.inputs for finding in softmaxes if finding.differing}


def over_ranks(findings: list[Finding], group: dist.ProcessGroup) -> list[Finding]:
    """Each finding from the rank where most comparisons differed. The same on every rank."""
    everywhere: list[list[Finding]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(everywhere, findings, group=group)
    return [max(same, key=lambda x: x.differing) for same in zip(*everywhere, strict=True)]


def shard_sizes(product: Product, degrees: Sequence[int]) -> list[int]:
    """Output features of a rank at every degree, the whole first."""
    return [product.outputs // d for d in sorted({1, *degrees}) if product.sharded or d == 1]


def _distinct(products: Sequence[Product]) -> list[Product]:
    names: dict[tuple[int, int, bool], list[str]] = {}
    for p in products:
        names.setdefault((p.inputs, p.outputs, p.sharded), []).append(p.name)
    return [Product(k, n, ", ".join(same), cut) for (k, n, cut), same in names.items()]


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
    """Of the most rows: from the start, an odd place, the middle, and up to the end."""
    most = max(tried)
    for rows in tried:
        for first in sorted({0, min(5, most - rows), (most - rows) // 2, most - rows}):
            yield slice(first, first + rows)


def _slices(
    product: Product, degrees: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Compared:
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
    """x [rows, K] and weight [N, K] whose products cancel in pairs, at places drawn at random.

    What is left of a sum is its roundings, so that another order shows in almost every element,
    in bfloat16 too, which hides it behind the rounding of the result otherwise.
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


def _softmax_slices(width: int, device: torch.device) -> Compared:
    draw = torch.Generator(device).manual_seed(0)
    tried = [rows for rows in _rows_tried(device) if rows <= SOFTMAX_ROWS]
    logits = 4 * torch.randn(max(tried), width, generator=draw, device=device)
    for name, function in (("softmax", F.softmax), ("log_softmax", F.log_softmax)):
        whole = function(logits, dim=-1)
        for rows in _row_slices(tried):
            part = function(logits[rows], dim=-1)
            yield f"{name} of rows {rows.start} to {rows.stop}", part, whole[rows]


def _refuse_other_threads(device: torch.device, group: dist.ProcessGroup) -> None:
    if device.type != "cpu":
        return
    counts: list[int] = [0] * dist.get_world_size(group)
    dist.all_gather_object(counts, torch.get_num_threads(), group=group)
    if len(set(counts)) > 1:
        raise RuntimeError(
            f"batch_invariant=true: ranks have {min(counts)} to {max(counts)} CPU threads, whose "
            "sums differ; set OMP_NUM_THREADS to one number on all hosts"
        )


def _describe(product: Product) -> str:
    if not product.inputs:
        return product.name
    return f"{product.name} [K {product.inputs}, N {product.outputs}]"


def _refuse(findings: list[Finding], device: torch.device) -> None:
    if not findings:
        return
    lines = [
        f"{_describe(f.product)}: {f.differing} of {f.comparisons} differ, first {f.first}"
        for f in findings
    ]
    remedy = "on the CPU try OMP_NUM_THREADS=1" if device.type == "cpu" else "use a Hopper GPU"
    raise RuntimeError(
        f"batch_invariant=true: on this machine results depend on the batch, with the kernels of "
        f"fixed tiles too; {remedy}, or set batch_invariant=false\n" + "\n".join(lines)
    )


def _report(comparisons: int, shapes: int, moved: list[Product]) -> str:
    line = f"batch-invariant: {comparisons:,} comparisons of {shapes} shapes equal"
    return line + (f"; by our own kernels: {', '.join(map(_describe, moved))}" if moved else "")
