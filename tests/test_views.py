"""Parameters in expressions: bare, and as views of their rows or transposes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.capture_cases import OPAQUE, N, check
from tests.cases import Lambda, features, parameter

# Bare weights and biases, and views of them -------------------------------------------

W, B = {"w": "linear"}, {"b": "dense: add"}
Expression = tuple[str, Callable[..., Tensor], dict[str, tuple[int, ...]], Any, Any]
# Forward pass, shapes of the parameters and of one sample, what is expected.
EXPRESSIONS: list[Expression] = [
    ("x @ w", lambda m, x: x @ m.w, {"w": (4, 3)}, (4,), W),
    ("x @ w of tokens", lambda m, x: (x @ m.w).sum(1), {"w": (4, 3)}, (3, 4), W),
    ("x @ w.T", lambda m, x: x @ m.w.T, {"w": (3, 4)}, (4,), W),
    ("x @ w.mT", lambda m, x: x.matmul(m.w.mT), {"w": (3, 4)}, (4,), W),
    ("x @ w.T.T", lambda m, x: x @ m.w.T.T, {"w": (4, 3)}, (4,), W),
    ("mm of t", lambda m, x: torch.mm(x, m.w.t()), {"w": (3, 4)}, (4,), W),
    (
        "matmul of transpose",
        lambda m, x: torch.matmul(x, m.w.transpose(0, 1)).sum(1),
        {"w": (3, 4)},
        (2, 4),
        W,
    ),
    (
        "linear with a transposed weight",
        lambda m, x: F.linear(x, m.w.T),
        {"w": (4, 3)},
        (4,),
        W,
    ),
    (
        "a vector",
        lambda m, x: torch.stack([x @ m.w, (x * x).mv(m.w)], 1),
        {"w": (4,)},
        (4,),
        {"w": "matvec + matvec"},
    ),
    (
        "a vector for each token",
        lambda m, x: torch.matmul(x, m.w).sin(),
        {"w": (4,)},
        (3, 4),
        {"w": "matvec"},
    ),
    (
        "addmm",
        lambda m, x: torch.addmm(m.b, x, m.w),
        {"w": (4, 3), "b": (3,)},
        (4,),
        {"w": "linear", "b": "dense: linear"},
    ),
    (
        "addmm of tokens with samples first and a transposed weight",
        lambda m, x: torch.addmm(m.b, x.view(-1, 4), m.w.T).view(len(x), -1, 3).sum(1),
        {"w": (3, 4), "b": (1, 3)},
        (2, 4),
        {"w": "linear", "b": "dense: linear"},
    ),
    (
        "addmm with factors",
        lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5, alpha=2.0),
        {"w": (4, 3), "b": (3,)},
        (4,),
        {"w": OPAQUE, "b": OPAQUE},
    ),
    (
        "arguments by name, in another order",
        lambda m, x: (
            torch.addmm(mat2=m.w, mat1=x, input=m.b).sin()
            + torch.matmul(other=m.w, input=x)
            + torch.sub(other=m.b, input=torch.mul(other=m.b, input=x[:, :3]))
        ),
        {"w": (4, 3), "b": (3,)},
        (4,),
        {"w": "linear + linear", "b": "dense: linear + mul + add"},
    ),
    ("x + b", lambda m, x: (x + m.b).sin(), {"b": (3,)}, (3,), B),
    ("b + x", lambda m, x: (m.b + x).sin(), {"b": (3,)}, (3,), B),
    ("x - b", lambda m, x: (x - m.b).sin(), {"b": (3,)}, (3,), B),
    ("b - x", lambda m, x: (m.b - x).sin(), {"b": (3,)}, (3,), B),
    ("a scalar", lambda m, x: (x + m.b).sin(), {"b": ()}, (3,), B),
    ("one entry", lambda m, x: (x + m.b).sin(), {"b": (1, 1)}, (3,), B),
    (
        "outputs without an axis",
        lambda m, x: (x.sum(1) * m.g + m.b).sin()[:, None].expand(-1, 2),
        {"g": (), "b": (1,)},
        (3,),
        {"g": "dense: mul", "b": "dense: add"},
    ),
    (
        "a token of all samples",
        lambda m, x: torch.cat([m.b.expand(len(x), -1, -1), x], 1).sin().sum(1),
        {"b": (1, 2, 3)},
        (2, 3),
        {"b": "dense: expand"},
    ),
    (
        "a row as the data, twice",
        lambda m, x: m.b[1].expand_as(x).sin() * x + m.b[1].broadcast_to(x.shape).cos(),
        {"b": (2, 3)},
        (3,),
        {"b": "dense: expand + expand"},
    ),
    (
        "tokens with samples in the second axis",
        lambda m, x: torch.cat([m.b.expand(2, len(x), -1), x[None]]).sin().prod(0),
        {"b": (2, 1, 3)},
        (3,),
        {"b": "dense: expand"},
    ),
    (
        "rows of a weight that is expanded",
        lambda m, x: F.linear(x, m.b.expand(3, -1)).sin(),
        {"b": (1, 3)},
        (3,),
        {"b": OPAQUE},
    ),
    (
        "add with a factor",
        lambda m, x: torch.add(x, m.b, alpha=-2.0).sin() * m.b.add(x, alpha=3.0),
        {"b": (3,)},
        (3,),
        {"b": "dense: add + add"},
    ),
    (
        "sub with a factor",
        lambda m, x: torch.sub(x, m.b, alpha=-2.0).sin() * m.b.sub(x, alpha=3.0),
        {"b": (3,)},
        (3,),
        {"b": "dense: add + add"},
    ),
    (
        "in place",
        lambda m, x: x.sin().add_(m.b).sub_(m.b, alpha=0.5).sin(),
        {"b": (3,)},
        (3,),
        {"b": "dense: add + add"},
    ),
    (
        "scaled in place",
        lambda m, x: x.sin().mul_(m.b).sin(),
        {"b": (3,)},
        (3,),
        {"b": OPAQUE},
    ),
    (
        "a bias that repeats the data",
        lambda m, x: (x + m.b).sum(1).sin(),
        {"b": (4, 3)},
        (1, 3),
        B,
    ),
    (
        "x * g",
        lambda m, x: (x * m.g).sin() + (m.g * x.cos()).sin() + torch.mul(x, m.g),
        {"g": (3,)},
        (3,),
        {"g": "dense: mul + mul + mul"},
    ),
    (
        "a product that repeats the data",
        lambda m, x: (x * m.g).sin().sum(2),
        {"g": (2, 3)},
        (2, 1),
        {"g": "dense: mul"},
    ),
    (
        "channels of images",
        lambda m, x: ((x * m.g + m.b).sin()).sum((2, 3)),
        {"g": (3, 1, 1), "b": (1, 3, 1, 2)},
        (3, 2, 2),
        {"g": "dense: mul", "b": "dense: add"},
    ),
    (
        "samples second",
        lambda m, x: (x.transpose(0, 1) * m.g + m.b).sin().sum(0),
        {"g": (3, 1, 3), "b": (3,)},
        (3, 3),
        {"g": "dense: mul", "b": "dense: add"},
    ),
    (
        "samples and tokens in one axis",
        lambda m, x: (x.reshape(-1, 3) * m.g + m.b).sin().view(len(x), -1, 3).sum(1),
        {"g": (3,), "b": (1, 3)},
        (2, 3),
        {"g": "dense: mul", "b": "dense: add"},
    ),
    (
        "tokens and samples in one axis",
        lambda m, x: (
            (x.transpose(0, 1).reshape(-1, 3) * m.g).sin().view(-1, len(x), 3).sum(0)
        ),
        {"g": (3,)},
        (2, 3),
        {"g": "dense: mul"},
    ),
    (
        "of a parameter alone",
        lambda m, x: F.linear(x, m.w * m.g) + (m.b * 2.0 + 1.0),
        {"w": (3, 4), "g": (3, 1), "b": (3,)},
        (4,),
        {"w": OPAQUE, "g": OPAQUE, "b": OPAQUE},
    ),
    (
        "complex",
        lambda m, x: torch.fft.irfft(torch.fft.rfft(x) * m.g, n=4)[:, :3],
        {"g": (3,)},
        (4,),
        {"g": OPAQUE},
    ),
    (
        "the first positions",
        lambda m, x: (x + m.b[: x.shape[1]]).sin().sum(1),
        {"b": (5, 3)},
        (2, 3),
        B,
    ),
    (
        "positions with an axis for samples",
        lambda m, x: (x + m.b[:, 1:3, :]).sin().sum(1),
        {"b": (1, 5, 3)},
        (2, 3),
        B,
    ),
    (
        "each row for itself",
        lambda m, x: sum(F.linear(x, m.w[i, None]).sin() * m.b[i] for i in range(3)),
        {"w": (3, 4), "b": (3, 2)},
        (4,),
        {"w": " + ".join(["linear"] * 3), "b": "dense: " + " + ".join(["mul"] * 3)},
    ),
    (
        "rows twice and not at all",
        lambda m, x: F.linear(x, m.w[:2], m.b[1:]).sin() + F.linear(x.sin(), m.w[:2]),
        {"w": (4, 3), "b": (3,)},
        (3,),
        {"w": "linear + linear", "b": "dense: linear"},
    ),
    (
        "rows that overlap",
        lambda m, x: F.linear(x, m.w[:3]).sin() * F.linear(x, m.w[1:]),
        {"w": (4, 3)},
        (3,),
        {"w": "dense: linear + linear"},
    ),
    (
        "all parameters in one vector",
        lambda m, x: (
            F.linear(x, m.w[:6].view(2, 3), m.w[6:8]).sin() @ m.w[8:].view(2, 3)
        ),
        {"w": (14,)},
        (3,),
        {"w": "linear + linear + linear"},
    ),
    (
        "columns",
        lambda m, x: x[:, :2] @ m.w[:2] + x[:, 2:] @ m.w.narrow(0, 2, 2),
        {"w": (4, 3)},
        (4,),
        {"w": "linear + linear"},
    ),
    (
        "a slice of columns",
        lambda m, x: F.linear(x, m.w[:, 1:]),
        {"w": (3, 5)},
        (4,),
        {"w": OPAQUE},
    ),
    (
        "a chosen row",
        lambda m, x: F.linear(x, m.w[[2, 0]]) + m.w[m.w[:, 0] > 0].sum(),
        {"w": (3, 4)},
        (4,),
        {"w": OPAQUE},
    ),
    (
        "rows by a mask",
        lambda m, x: F.linear(x, m.w[[True, False, True]]) + m.w[True].sum(),
        {"w": (3, 4)},
        (4,),
        {"w": OPAQUE},
    ),
    (
        "a copy with its axes exchanged",
        lambda m, x: F.linear(x, m.w.T.ravel().view(3, 4)),
        {"w": (3, 4)},
        (4,),
        {"w": OPAQUE},
    ),
    (
        "a number of NumPy",
        lambda m, x: (x @ m.w[np.int64(1)]).unsqueeze(1),
        {"w": (3, 4)},
        (4,),
        {"w": "matvec"},
    ),
    (
        "a convolution with a view",
        lambda m, x: F.conv1d(x, m.w.view(2, 2, 3)[1:], m.b[:1]).flatten(1),
        {"w": (2, 6), "b": (2,)},
        (2, 4),
        {"w": "conv", "b": "dense: conv"},
    ),
    (
        "a kernel with its axes exchanged",
        lambda m, x: F.conv1d(x, m.w.transpose(0, 1)).flatten(1),
        {"w": (3, 2, 2)},
        (3, 2),
        {"w": OPAQUE},
    ),
    (
        "an embedding of a transposed table",
        lambda m, x: F.embedding((x > 0).long(), m.w.T).sum(1).sin(),
        {"w": (3, 2)},
        (4,),
        {"w": "embedding"},
    ),
    (
        "a transposed product",
        lambda m, x: (x * m.w.T).sin().sum(1),
        {"w": (3, 2)},
        (2, 3),
        {"w": "dense: mul"},
    ),
    (
        "a view for a shape only",
        lambda m, x: (
            F.linear(x, m.w).view(-1, *m.w.T.shape[1:]) + x.new_ones(m.w[0].shape).sum()
        ),
        {"w": (3, 4)},
        (4,),
        W,
    ),
    (
        "a view without derivative",
        lambda m, x: F.linear(x, m.w) * (x @ m.w.detach().T) + x @ m.w.data.T,
        {"w": (3, 4)},
        (4,),
        W,
    ),
]


@pytest.mark.parametrize("row", EXPRESSIONS, ids=lambda row: row[0])
def test_expression(row: Expression) -> None:
    _, forward, shapes, shape, uses = row
    net = Lambda(forward, **{name: parameter(*s) for name, s in shapes.items()})
    check(net, features(N, *shape).double(), uses)


def test_views_of_parameters_with_other_strides() -> None:
    # In memory, channels come last: what is a view of that is none of ordinary strides,
    # and what is none may have a known order of entries.
    def forward(m: Any, x: Tensor) -> Tensor:
        h = x @ m.w.permute(0, 2, 3, 1).view(8, 3) + F.linear(x, m.v.reshape(3, 8))
        return h + F.linear(x, m.u[:3].mT.mT, m.u[3:, 0].sin())

    v, w = (parameter(*s).data for s in [(3, 2, 2, 2), (2, 3, 2, 2)])
    net = Lambda(
        forward,
        v=nn.Parameter(v.to(memory_format=torch.channels_last)),
        w=nn.Parameter(w.to(memory_format=torch.channels_last)),
        u=nn.Parameter(parameter(8, 6).data.T),
    )
    check(net, features(N, 8).double(), {"v": "linear", "w": OPAQUE, "u": OPAQUE})
