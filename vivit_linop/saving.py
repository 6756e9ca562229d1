"""Saving what took long: eigenpairs and operators with their Gram matrices.

A file holds tensors, numbers and strings only, so that ``torch.load`` reads it with
``weights_only=True``, and a fingerprint of the risk that they belong to. The net and
the data are not in it: they are given again to :func:`load`, and must be the same.
How it comes to disk and back unharmed is in :mod:`vivit_linop.files`.
"""

from __future__ import annotations

import os
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from vivit_linop import files
from vivit_linop.curvature.fisher import EmpiricalFisher, PerSampleGradients
from vivit_linop.curvature.ggn import GGN, GGNFactor
from vivit_linop.curvature.jacobian import Jacobian, Pullback
from vivit_linop.curvature.loss_hessian import LossHessian, LossHessianSqrt
from vivit_linop.linalg.decompositions import GramEigenpairs
from vivit_linop.modes import ordinary_mode
from vivit_linop.operators.eigenpairs import Eigenpairs
from vivit_linop.operators.lowrank import Gram, LowRank
from vivit_linop.risk.data.containers import map_leaves
from vivit_linop.risk.empirical import EmpiricalRisk, check_risk

Saved = Eigenpairs | LowRank | Gram
Path = str | os.PathLike[str]
Loaded = TypeVar("Loaded")


@ordinary_mode()
def save(result: Saved, path: Path, risk: EmpiricalRisk) -> None:
    """Save eigenpairs, or an operator with its Gram matrix, to a file.

    Eigenpairs from a Gram matrix are saved as such, with eigenvectors of G only if they
    have been formed. The Gram matrix ``[N·R, N·R]`` is saved if it has been computed,
    also that of the operator that eigenpairs come from; a Monte-Carlo draw with all
    that depends on it, ``[N, C, M]``. The fingerprint takes a pass over the data,
    without the model. The file replaces one of that name only when it is complete and
    on disk; it keeps the permissions of that one, and a link stays a link. It ends with
    a digest, by which :func:`load` sees damage.

    Args:
        result: What ``eigh`` returned; a GGN or an EmpiricalFisher (or a multiple); a
            Gram operator ``V.T @ V`` or ``J @ J.T``.
        path: The file.
        risk: What ``result`` was computed from.

    Raises:
        TypeError: If it is something else. Tensors are for ``torch.save``.
        ValueError: If it belongs to another risk.
        OSError: If the folder is missing or may not be written to, the path is that of
            a folder, or there is no room.

    Example:
        >>> import tempfile, torch, vivit_linop as vl
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> net, loss = nn.Linear(3, 3), nn.CrossEntropyLoss()
        >>> data = (torch.rand(6, 3), torch.randint(3, (6,)))
        >>> risk = vl.EmpiricalRisk(net, loss, data)
        >>> pairs = vl.GGN(risk).eigh(k=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     vl.save(pairs, f"{folder}/pairs.pt", risk)
        ...     same_risk = vl.EmpiricalRisk(net, loss, data)  # as after a restart
        ...     loaded = vl.load(f"{folder}/pairs.pt", same_risk)
        >>> step = vl.damped_newton_step(same_risk, loaded, damping=0.1)
        >>> torch.allclose(step, vl.damped_newton_step(risk, pairs, damping=0.1))
        True
    """
    check_risk(risk)
    with risk.ranks.together("save"):
        if risk.ranks.leads:
            files.check_place(path)  # before anything is computed
    packed = _without_rest(_packed(result, risk))
    content = {"fingerprint": risk.fingerprint(), "result": packed}
    with risk.ranks.together("save"):
        if risk.ranks.leads:
            files.write(content, path)


@overload
def load(path: Path, risk: EmpiricalRisk) -> Any: ...
@overload
def load(path: Path, risk: EmpiricalRisk, kind: type[Loaded]) -> Loaded: ...


@ordinary_mode()
def load(path: Path, risk: EmpiricalRisk, kind: type[Any] = object) -> Any:
    """Load what :func:`save` saved, for a risk with the same model, loss and data.

    Costs a pass over the data, without the model, for the fingerprint.

    Args:
        path: The file.
        risk: What it was computed from, built again. Batches may be cut differently.
        kind: What it must be, such as ``vl.Eigenpairs``; for type checkers too.

    Returns:
        Eigenpairs or an operator, on the device of the risk.

    Raises:
        TypeError: If it is not of the kind.
        ValueError: If the file is damaged, none of :func:`save` or of another version
            of the format (the first had no digest); if the model, the loss or the data
            are others.
        OSError: If it cannot be opened.

    Example:
        >>> import tempfile, torch, vivit_linop as vl
        >>> from torch import nn
        >>> net, data = nn.Linear(3, 1), (torch.rand(6, 3), torch.rand(6, 1))
        >>> risk = vl.EmpiricalRisk(net, nn.MSELoss(), data)
        >>> other = vl.EmpiricalRisk(net, nn.MSELoss(), (data[0], 2 * data[1]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     G = vl.GGN(risk)
        ...     evals = G.eigvalsh()
        ...     vl.save(G, f"{folder}/ggn.pt", risk)
        ...     G = vl.load(f"{folder}/ggn.pt", risk)  # knows its Gram matrix
        ...     print(torch.equal(G.eigvalsh(), evals))
        ...     vl.load(f"{folder}/ggn.pt", other)
        Traceback (most recent call last):
        ValueError: risk: ... was saved for one with other samples, other value of ...
    """
    check_risk(risk)
    if not isinstance(kind, type):
        raise TypeError(f"kind: a class, as vl.Eigenpairs, got {kind!r}.")
    content = risk.ranks.led(files.read, path, risk.device)
    saved, given = content["fingerprint"], risk.fingerprint()
    others = [name for name in given if not _same(saved.get(name), given[name], risk)]
    if others:
        raise ValueError(
            f"risk: {path} was saved for one with other {', other '.join(others)}. "
            "Build the risk as it was, from the same parameters, buffers and samples "
            "in the same order."
        )
    result = _unpacked(content["result"], risk)
    if not isinstance(result, kind):
        raise TypeError(f"kind: {path} holds {result!r}, no {kind.__name__}.")
    return result


def _same(saved: Any, given: Any, risk: EmpiricalRisk) -> bool:
    """Numbers may differ by the order of summation, digests not at all."""
    if isinstance(saved, float) and isinstance(given, float):
        tolerance = 10 * torch.finfo(risk.dtype).eps ** 0.5
        return abs(saved - given) <= tolerance * (abs(saved) + abs(given))
    return bool(saved == given)


# Results -----------------------------------------------------------------------------


def _packed(result: Any, risk: EmpiricalRisk) -> dict[str, Any]:
    """Turn a result into tensors, numbers and strings."""
    if isinstance(result, GramEigenpairs):
        return _packed_pairs(result) | {"operator": _packed(result.operator, risk)}
    if isinstance(result, Eigenpairs):
        if len(result.eigenvectors) != risk.num_params:
            raise ValueError(
                f"risk: has {risk.num_params} parameters, the eigenvectors have "
                f"{len(result.eigenvectors)} entries."
            )
        return {
            "kind": "pairs",
            "eigenvalues": result.eigenvalues,
            "eigenvectors": result.eigenvectors,
            "route": result.route,
        }
    if isinstance(result, LowRank) and isinstance(result.factor, Pullback):
        packed = {
            "kind": "low rank",
            "scale": float(result.scale),
            **_packed_factor(result.factor, result.gram, risk),
        }
        if result.route is None and not result.by_gram and result.kept.known:
            packed["outer"] = result.kept.matrix
        return packed
    if isinstance(result, Gram) and isinstance(result.left, Pullback):
        if result.left is result.right:
            return {"kind": "Gram", **_packed_factor(result.left, result, risk)}
    raise TypeError(
        "result: eigenpairs, a GGN, an EmpiricalFisher or a Gram operator V.T @ V of a "
        f"risk, got {type(result).__name__}. Tensors and others are for torch.save."
    )


def _without_rest(packed: dict[str, Any]) -> Any:
    """Copy the tensors that are a part of a larger memory, which would be saved too."""

    def alone(tensor: Tensor) -> Tensor:
        is_part = tensor.untyped_storage().nbytes() > tensor.nbytes
        return tensor.clone() if is_part else tensor

    return map_leaves(alone, packed)


def _packed_pairs(pairs: GramEigenpairs) -> dict[str, Any]:
    packed: dict[str, Any] = {
        "kind": "Gram pairs",
        "eigenvalues": pairs.eigenvalues,
        "gram_eigenvectors": pairs.gram_eigenvectors.contiguous(),
        "route": pairs.route,
    }
    if "eigenvectors" in pairs.__dict__:
        packed["eigenvectors"] = pairs.eigenvectors
    if pairs._larger is not None:
        packed["larger"] = _packed_pairs(pairs._larger)
    return packed


def _packed_factor(factor: Pullback, gram: Gram, risk: EmpiricalRisk) -> dict[str, Any]:
    if factor.risk is not risk:
        raise ValueError("risk: the result was computed from another EmpiricalRisk.")
    packed: dict[str, Any] = {}
    if isinstance(factor, GGNFactor) and not _is_subtracted(factor):
        packed["factor"] = "GGN"
        packed["positive_part"] = factor.root.hessian.positive_part
        if factor.mc_samples:
            packed["draw"] = factor.root.draw()
    elif isinstance(factor, PerSampleGradients):
        packed["factor"] = "gradients"
    elif factor.is_plain:
        packed["factor"] = "Jacobian"
    else:
        raise TypeError(
            f"result: comes from {factor!r}, which cannot be saved. Save the tensor "
            ".to_dense() with torch.save."
        )
    if gram.known:
        rows = gram.rows
        packed["matrix"] = gram.matrix if rows is None else rows.on_leader()
    return packed


def _is_subtracted(factor: GGNFactor) -> bool:
    """Whether it is of H₋, which is subtracted in G: no file would tell."""
    hessian = factor.root.hessian
    return hessian.loss is not factor.risk.loss and not hessian.positive_part


def _unpacked(packed: dict[str, Any], risk: EmpiricalRisk) -> Any:
    if packed["kind"] == "low rank":
        factor = _unpacked_factor(packed, risk)
        op = LowRank(factor)
        if isinstance(factor, GGNFactor):
            op = GGN.of(factor)
        elif isinstance(factor, PerSampleGradients):
            op = EmpiricalFisher(risk)
            op.factor = factor
        if "outer" in packed:
            op.kept.matrix = packed["outer"]
        return op if op.scale == packed["scale"] else op.rescaled(packed["scale"])
    if packed["kind"] == "Gram":
        return _unpacked_factor(packed, risk).gram
    if packed["kind"] == "pairs":
        pairs = Eigenpairs(packed["eigenvalues"], packed["eigenvectors"])
    else:
        pairs = _unpacked_pairs(packed, _unpacked(packed["operator"], risk))
    pairs.route = packed["route"]
    return pairs


def _unpacked_pairs(packed: dict[str, Any], operator: LowRank) -> GramEigenpairs:
    larger = packed.get("larger")
    pairs = GramEigenpairs(
        packed["eigenvalues"],
        operator,
        packed["gram_eigenvectors"],
        None if larger is None else _unpacked_pairs(larger, operator),
    )
    if "eigenvectors" in packed:
        pairs.__dict__["eigenvectors"] = packed["eigenvectors"]
    return pairs


def _unpacked_factor(packed: dict[str, Any], risk: EmpiricalRisk) -> Pullback:
    jacobian = Jacobian(risk)
    if packed["factor"] == "GGN":
        positive = packed.get("positive_part", False)
        hessian = LossHessian(risk, positive_part=positive)
        root = (
            LossHessianSqrt.of_draw(hessian, packed["draw"])
            if "draw" in packed
            else LossHessianSqrt(hessian)
        )
        factor: Pullback = GGNFactor.through(jacobian, root)
    elif packed["factor"] == "gradients":
        factor = PerSampleGradients(risk)
    else:
        factor = jacobian.pullback
    if "matrix" in packed:
        factor.gram.keep(packed["matrix"], factor.layout.own)
    return factor
