"""Operators that refuse products: what is computed then is computed without them."""

import pytest

import vivit_linop as vl


def refuse_products(
    monkeypatch: pytest.MonkeyPatch, *kinds: type[vl.TorchLinearOperator]
) -> None:
    """Let operators of these kinds refuse to be multiplied with vectors.

    In the two methods that a subclass defines, whoever calls them:
    docs/extending/operator.md.
    """

    def refuse(op: vl.TorchLinearOperator, *_: object) -> None:
        raise AssertionError(f"a product with {op}")

    for kind in kinds:
        for name in ("_multiply", "_multiply_adjoint"):
            monkeypatch.setattr(kind, name, refuse)
