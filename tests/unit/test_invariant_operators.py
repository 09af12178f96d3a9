"""Every operation that the model executes on a CPU: the same bits for a row whatever is computed
with it, for several thread counts, where the ordinary kernels differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

from mesh.invariant.reductions import tree_sum
from mesh.invariant.selftest import Product, operands
from mesh.invariant.switch import batch_invariant, use_ordinary_softmax
from mesh.model.attention import AttentionContext, KVCache, attention, packed_context
from mesh.model.layers import rms_norm, rotate, swiglu
from mesh.model.logprobs import token_logprobs
from mesh.model.rope import rope_table
from mesh.model.tiles import tile_scores

THREADS = (1, 2, 3)
ROWS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 100, 129, 257)
DTYPES = (torch.float32, torch.bfloat16)
SHAPES = ((40, 4), (96, 24), (128, 384), (384, 128), (1024, 256), (1100, 8), (3072, 64))

Pair = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(params=THREADS, ids=lambda count: f"{count} threads")
def threads(request) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def pairs(inputs: int, outputs: int, dtype: torch.dtype) -> Iterator[Pair]:
    """a and b as a linear layer multiplies them: forward, both gradients, and a part of a row.

    The self-test's operands show the order of a sum in bfloat16 too.
    """
    x, weight = operands(Product(inputs, outputs, ""), 257, dtype, torch.device("cpu"))
    grad = torch.randn(257, outputs, generator=torch.Generator().manual_seed(0)).to(dtype)
    wide = torch.cat([x, x, x], 1)[:, inputs:-inputs]
    return iter([(x, weight.t()), (grad, weight), (grad.t(), x), (wide, weight.t())])


def differing_products(dtype: torch.dtype) -> int:
    """Slices of rows and columns whose product differs from the same part of the whole."""
    draw = torch.Generator().manual_seed(1)
    differing = compared = 0
    for a, b in (pair for shape in SHAPES for pair in pairs(*shape, dtype)):
        whole = a @ b
        for rows in (count for count in ROWS if count <= len(a)):
            first = int(torch.randint(len(a) - rows + 1, (1,), generator=draw))
            part = slice(first, first + rows)
            differing += not torch.equal(a[part] @ b, whole[part])
            compared += 1
        for degree, rows in ((2, 1), (2, 33), (4, 17), (4, len(a))):
            shards = zip(b.chunk(degree, 1), whole.chunk(degree, 1), strict=True)
            differing += sum(not torch.equal(a[:rows] @ y, z[:rows]) for y, z in shards)
            compared += degree
    assert compared > 500
    return differing


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_do_not_depend_on_other_rows_and_columns(threads, dtype):
    with batch_invariant(True, "cpu"):
        assert differing_products(dtype) == 0
    assert differing_products(dtype) > 0, "control: the ordinary kernels differ at these shapes"


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.int64])
def test_products_are_the_plain_ones(dtype):
    for rows, inputs, outputs in ((5, 300, 1), (1, 7, 3), (17, 1030, 40), (0, 4, 3), (3, 0, 4)):
        a, b = (4 * torch.randn(shape) for shape in ((rows, inputs), (inputs, outputs)))
        a, b = a.to(dtype), b.to(dtype)
        with batch_invariant(True, "cpu"):
            result = a @ b
        assert result.dtype == dtype and result.is_contiguous()
        exact = a.double() @ b.double()
        scale = {torch.bfloat16: 1e-2, torch.float32: 1e-6}.get(dtype, 1e-14)
        assert (result.double() - exact).norm() <= scale * exact.norm()
    with batch_invariant(True, "cpu"), pytest.raises(RuntimeError, match="cannot be multiplied"):
        torch.mm(torch.ones(2, 256), torch.ones(300, 2))


def row_wise(dtype: torch.dtype) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Functions of [rows, 3 * 40] that the model applies to rows."""
    table = rope_table(40, 1, 1e4, torch.device("cpu"))
    weight = torch.linspace(0.5, 1.5, 120).to(dtype)
    head = torch.randn(130, 120, generator=torch.Generator().manual_seed(2)).to(dtype)

    def logprobs(x: torch.Tensor) -> torch.Tensor:
        return token_logprobs(x, head, torch.full((len(x),), 77), 0.7).logprobs_A

    return {
        "swiglu": lambda x: swiglu(x, x + 1),
        "rms_norm": lambda x: rms_norm(x, weight, 1e-6),
        "rotate": lambda x: rotate(x.view(1, -1, 3, 40), table.expand(len(x), -1))[0],
        "logprobs": logprobs,
        "softmax": lambda x: F.softmax(x, -1),
        "log_softmax": lambda x: F.log_softmax(x, -1),
        "mean": lambda x: x.mean(-1),
    }


def differing_functions(dtype: torch.dtype, names: list[str]) -> dict[str, int]:
    x = 3 * torch.randn(257, 120, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = {}
    for name in names:
        function = row_wise(dtype)[name]
        whole = function(x)
        parts = [slice(first, first + n) for n in ROWS for first in {0, min(5, 257 - n), 257 - n}]
        assert len(parts) > 38
        found[name] = sum(not torch.equal(function(x[part]), whole[part]) for part in parts)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_model_does_to_a_row_does_not_depend_on_other_rows(threads, dtype):
    names = list(row_wise(dtype))
    with batch_invariant(True, "cpu"):
        assert differing_functions(dtype, names) == dict.fromkeys(names, 0)
        use_ordinary_softmax([120, 26])
        assert not any(differing_functions(dtype, ["softmax", "log_softmax", "logprobs"]).values())
    if dtype == torch.float32:
        control = differing_functions(dtype, ["swiglu", "logprobs"])
        assert min(control.values()) > 0, f"control: {control} differ without"


@pytest.mark.parametrize("log", [False, True])
def test_softmaxes_are_right_in_every_form(log):
    function, out_function = (
        (F.log_softmax, torch.log_softmax) if log else (F.softmax, torch.softmax)
    )
    for shape, dim in (((33, 50), -1), ((4, 7, 9), 1), ((6,), 0), ((), -1), ((5, 1), -1)):
        x = (5 * torch.randn(shape)).requires_grad_()
        grad = torch.randn(shape)
        results = []
        for on in (True, False):
            x.grad = None
            with batch_invariant(on, "cpu"):
                y = function(x, dim)
                y.backward(grad)
                out = out_function(x.detach(), dim, out=torch.empty(0))
                assert torch.equal(out, y)
                half = function(x.detach().bfloat16(), dim)
                wide = function(x.detach().bfloat16(), dim, dtype=torch.float32)
                assert half.dtype == torch.bfloat16 and wide.dtype == torch.float32
            results.append((y.detach(), x.grad, half, wide))
        for mine, plain in zip(*results, strict=True):
            tolerance = 2e-2 if mine.dtype == torch.bfloat16 else 1e-5
            assert torch.allclose(mine, plain, atol=tolerance, rtol=tolerance)
    with batch_invariant(True, "cpu"):
        assert function(torch.empty(0, 5), -1).shape == (0, 5)
        assert function(torch.empty(5, 0), -1).shape == (5, 0)
        kernel = torch.ops.aten._log_softmax if log else torch.ops.aten._softmax
        widened = kernel(torch.randn(3, 5).bfloat16(), -1, True)
        assert widened.dtype == torch.float32
        assert not torch.equal(widened, widened.bfloat16().float())


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8, 127, 1000])
def test_tree_sum_and_mean_do_not_depend_on_the_rows(width):
    x = torch.randn(33, width)
    assert torch.allclose(tree_sum(x), x.double().sum(-1).float(), atol=1e-4)
    with batch_invariant(True, "cpu"):
        whole = x.mean(-1)
        assert all(torch.equal(x[i : i + 1].mean(-1), whole[i : i + 1]) for i in range(33))
        assert x.mean(-1, keepdim=True).shape == (33, 1)
        assert torch.allclose(x.mean((0, 1)), x.double().mean().float(), atol=1e-5)
        assert torch.equal(
            torch.mean(x.bfloat16(), -1, out=torch.empty(0)), x.bfloat16().float().mean(-1)
        )
    assert torch.allclose(whole, x.double().mean(-1).float(), atol=1e-5)


LENGTHS = (3, 40, 600, 130)
PAGE, PAGES = 16, 40


def attended(lengths: tuple[int, ...], chunk: int, tensors: list[torch.Tensor]) -> torch.Tensor:
    """Attention of sequences fed to a paged cache `chunk` tokens at a time, packed again."""
    starts = torch.tensor([0, *lengths]).cumsum(0)
    pages = [
        torch.zeros(PAGES * len(lengths), PAGE, *x.shape[1:], dtype=x.dtype) for x in tensors[1:]
    ]
    cache = KVCache([pages[0]], [pages[1]])
    table = torch.arange(PAGES * len(lengths), dtype=torch.int32).view(-1, PAGES)
    out = torch.full_like(tensors[0], torch.nan)
    for first in range(0, max(lengths), chunk):
        live = [i for i, length in enumerate(lengths) if length > first]
        new = [min(chunk, lengths[i] - first) for i in live]
        places = [torch.arange(first, first + n) for n in new]
        tokens = torch.cat([starts[i] + p for i, p in zip(live, places, strict=True)])
        slots = torch.cat([(i * PAGES * PAGE) + p for i, p in zip(live, places, strict=True)])
        ends = torch.tensor([first + n for n in new], dtype=torch.int32)
        used = -(-int(ends.max()) // PAGE)
        spans = torch.tensor([0, *new]).cumsum(0).int()
        context = AttentionContext(
            spans, ends, max(new), int(ends.max()), cache, table[live, :used], slots
        )
        out[tokens] = attention(*(x[tokens] for x in tensors), context, 0, 0.2)
    return out


def differing_attention(dtype: torch.dtype, num_heads: int, num_kv_heads: int) -> int:
    """Sequences that differ from the packed pass: alone, and in chunks of a paged cache."""
    draw = torch.Generator().manual_seed(0)
    heads = (num_heads, num_kv_heads, num_kv_heads)
    tensors = [torch.randn(sum(LENGTHS), n, 32, generator=draw).to(dtype) for n in heads]
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    whole = attention(*tensors, packed_context(starts, max(LENGTHS)), 0, 0.2)
    differing = 0
    for first, length in zip(starts.tolist(), LENGTHS, strict=False):
        one = packed_context(torch.tensor([0, length], dtype=torch.int32), length)
        part = slice(first, first + length)
        alone = attention(*(x[part] for x in tensors), one, 0, 0.2)
        differing += not torch.equal(alone, whole[part])
    for chunk in (7, 100):
        parts = attended(LENGTHS, chunk, tensors).split(LENGTHS)
        both = zip(parts, whole.split(LENGTHS), strict=True)
        differing += sum(not torch.equal(part, expected) for part, expected in both)
    return differing


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_does_not_depend_on_packing_and_chunks(threads, dtype):
    for heads in ((1, 1), (2, 1), (2, 2)):
        with batch_invariant(True, "cpu"):
            assert differing_attention(dtype, *heads) == 0
        assert differing_attention(dtype, *heads) > 0, "control: they differ without"


def test_attention_has_the_gradients_of_the_plain_one():
    tensors = [torch.randn(sum(LENGTHS), n, 32) for n in (4, 2, 2)]
    grad = torch.randn(sum(LENGTHS), 4, 32)
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    results = []
    for on in (True, False):
        leaves = [x.clone().requires_grad_() for x in tensors]
        with batch_invariant(on, "cpu"):
            out = attention(*leaves, packed_context(starts, max(LENGTHS)), 0, 0.2)
            out.backward(grad)
        results.append([out.detach(), *(x.grad for x in leaves)])
    for mine, plain in zip(*results, strict=True):
        assert torch.allclose(mine, plain, atol=1e-4)


@pytest.mark.parametrize("width", [16, 100, 4096], ids="tiles of {}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_scored_at_once_have_the_bits_of_tiles_alone(threads, dtype, width):
    """The generator scores all at once, the trainer each for itself."""
    edges = [width * tile for tile in range(9)]
    for rows in (1, 3, 32, 129):
        logits = 5 * torch.randn(rows, 8 * width, dtype=dtype)
        targets = torch.randint(-width, 9 * width, (rows,))
        with batch_invariant(True, "cpu"):
            for moments in (False, True):
                whole = tile_scores(logits, edges, targets, 0.7, moments)
                alone = [
                    tile_scores(logits[:, first : first + width], (first, first + width), targets,
                                0.7, moments)
                    for first in edges[:-1]
                ]  # fmt: skip
                assert torch.equal(whole, torch.cat(alone))
                assert (
                    whole[:, 1].isfinite().sum(0) == ((targets >= 0) & (targets < 8 * width))
                ).all()
