"""Modules that torch.distributed has cut into parts: guests like all others.

FSDP2, HSDP and tensor parallelism replace parameters by ``DTensor``s, of which each
process has a part, and register hooks that gather them for a forward pass. A risk has
the whole parameters, in a copy of the module without these hooks; the user's module
stays as it is, and goes on training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_PACKAGE = "torch.distributed"


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor of which this process may have a part.

    All processes that have parts of it must ask together.
    """
    gather = getattr(tensor, "full_tensor", None)  # of a DTensor, slow to import
    if gather is None:
        return tensor
    with torch.no_grad():
        full: Tensor = gather()
    return full


def without_sharding(name: str, attribute: Any) -> Any:
    """Return a module's hooks but for those that torch.distributed has registered.

    Attributes with other names are no hooks, and come back as they are.
    """
    if not name.endswith("_hooks") or not any(map(_gathers, attribute.values())):
        return attribute
    kept = [item for item in attribute.items() if not _gathers(item[1])]
    return type(attribute)(kept)


def _gathers(hook: Any) -> bool:
    module = getattr(hook, "__module__", None)
    return isinstance(module, str) and module.startswith(_PACKAGE)
