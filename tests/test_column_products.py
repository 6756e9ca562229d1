"""Products of several vectors with columns that are sums of outer products."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from vivit_linop.devices import fresh
from vivit_linop.net.columns.products import add_outer_products, images

F64 = torch.float64
# n, groups, a, b, positions. The wide ones are copied in several parts, also of the
# size for several threads.
SHAPES = {
    "linear": (5, 1, 4, 3, 1),
    "wide": (2, 1, 2100, 150, 1),
    "tokens": (3, 1, 4, 3, 5),
    "wide tokens": (2, 1, 2100, 40, 2),
    "grouped linear": (3, 2, 4, 3, 1),
    "grouped convolution": (3, 2, 4, 3, 5),
}
Layout = Callable[[Tensor], Tensor]
LAYOUTS: dict[str, Layout] = {
    "rows": lambda rows: rows,
    "columns": lambda rows: rows.T.contiguous().T,
    "part of rows": lambda rows: rows.repeat(1, 2)[:, : rows.shape[1]],
    "part of columns": lambda rows: rows.repeat(2, 1).T.contiguous().T[: len(rows)],
}


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(0))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("inputs_first", [False, True])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("K", [1, 4])
def test_products(name: str, K: int, inputs_first: bool) -> None:
    n, G, a, b, P = SHAPES[name]
    inputs, weights = noise(n, G, a, P), noise(K, G, b, a)
    signals = noise(K, n, G, b, P)
    as_rows = inputs.permute(1, 0, 3, 2).reshape(G, n * P, a)
    rows = (weights.mT if inputs_first else weights).flatten(1)
    expected = torch.einsum("kgba,ngap->kngbp", weights, inputs).flatten(2)
    for layout in LAYOUTS.values():
        found = images(layout(rows), as_rows, P, inputs_first)
        torch.testing.assert_close(found, expected)

    outer = torch.einsum("kngbp,ngap->kgba", signals, inputs)
    outer = (outer.mT if inputs_first else outer).flatten(1)
    # A part of what is written, as a parameter's is: what is beside it stays.
    around = torch.full((K, outer.shape[1] + 2), torch.nan, dtype=F64)
    out = around[:, 1:-1]
    for view in (signals, signals.transpose(0, 1).contiguous().transpose(0, 1)):
        add_outer_products(out, view, as_rows, inputs_first, add=False)
        torch.testing.assert_close(out, outer)
        add_outer_products(out, view, as_rows, inputs_first, add=True)
        torch.testing.assert_close(out, 2 * outer)
    assert around[:, 0].isnan().all() and around[:, -1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
def test_large_fresh_memory(dtype: torch.dtype) -> None:
    like = torch.zeros((), dtype=dtype)
    for shape in ((3, 5), (3, 2**24 // 3 + 1)):
        made = fresh(like, *shape)
        assert (made.shape, made.dtype, made.device) == (shape, dtype, like.device)
        assert made.is_contiguous()
        made[-1, -1] = 2.0
        assert made[-1, -1] == 2.0
