"""How often the host waits for a GPU, counted by CUDA's own debug mode.

The operations are those of the rehearsal, ``tests/rehearsal/operations.py``, and so are
the numbers that may not grow. CUDA counts copies from ordinary memory too, so what it
finds is to be at most waits and copies of the rehearsal together.
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field

import torch

from tests.rehearsal.limits import LIMITS
from tests.rehearsal.operations import NETS, OPERATIONS, setting


@dataclass(frozen=True)
class Waits:
    """What was counted of one operation on one net.

    Attributes:
        counted: Waits and copies, None where it failed.
        limit: Those of the rehearsal, together.
        error: Why it failed.
        places: Lines that waited, and how often.
    """

    net: str
    operation: str
    counted: int | None
    limit: int
    error: str = ""
    places: dict[str, int] = field(default_factory=dict)

    @property
    def grew(self) -> bool:
        return self.counted is not None and self.counted > self.limit


def counted(net: str, device: torch.device) -> list[dict[str, object]]:
    """Run every operation on a net; returns a row for each."""
    at = setting(net, lambda x: x.to(device))
    rows = []
    before = torch.cuda.get_sync_debug_mode()
    for operation, run in OPERATIONS.items():
        found, error = None, ""
        places: Counter[str] = Counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run(at)
                places.update(
                    f"{w.filename.rsplit('vivit_linop/', 1)[-1]}:{w.lineno}"
                    for w in caught
                    if "synchroniz" in str(w.message)
                )
                found = places.total()
            except Exception as problem:  # the other operations are of interest
                error = f"{type(problem).__name__}: {problem}"[:200]
            finally:
                torch.cuda.set_sync_debug_mode(before)
        limit = sum(LIMITS[operation])
        row = Waits(net, operation, found, limit, error, dict(places))
        rows.append({**asdict(row), "grew": row.grew})
    return rows


def count_all(device: torch.device) -> list[dict[str, object]]:
    return [row for net in NETS for row in counted(net, device)]
