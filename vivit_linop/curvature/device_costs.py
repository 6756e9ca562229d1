"""What devices take: the constants of cost models that are not operation counts."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from vivit_linop.arguments import as_device, check_real


@dataclass(frozen=True)
class DeviceCosts:
    """What a device takes, in seconds and rates: what the choice of a route rests on.

    There are defaults for a CPU and for a GPU; :func:`calibrate` measures the device at
    hand. ``explain(k)`` names what was used where that is not the CPU's default.

    Attributes:
        name: Of the device.
        rate: Floating-point operations of a large matrix product in float32, a second.
        bandwidth: Bytes of its memory that it reads a second.
        copying: Bytes a second between its memory and the host's; infinite on a CPU.
        call: Seconds of a product with G beside its arithmetic.
        step: Seconds of a product with a known matrix in a Krylov solver, beside
            reading it.
        tracing: Seconds to trace a net with convolutions for its linearisation.
        linearising: Seconds of a linearisation beside its arithmetic.
        short_pass: Seconds of a forward pass, most of which is overhead.
        all_pairs: Of a symmetric eigensolver for all pairs of n rows: its time, by that
            of n³ operations of a large matrix product.
        leading_pairs: Likewise for less than a quarter of them.
        passes: How many forward passes a product with V takes on the linearisation:
            two by its arithmetic, more by its time where activations are slow to read
            beside that.
        matrix_bandwidth: Bytes a second of a known matrix that is multiplied by one
            vector after the other; caches hold a part of it.
        row: Seconds of a symmetric eigensolver for each row, beside its arithmetic.

    Raises:
        TypeError: If one is no number.
        ValueError: If one is not positive.

    Example:
        >>> import vivit_linop as vl
        >>> costs = vl.DeviceCosts(
        ...     name="mine", rate=1e12, bandwidth=1e11, copying=float("inf"), call=1e-3,
        ...     step=1e-4, tracing=0.3, linearising=1e-2, short_pass=1e-4,
        ...     all_pairs=40.0, leading_pairs=10.0,
        ... )
        >>> costs.reading_flops
        10.0
    """

    name: str
    rate: float
    bandwidth: float
    copying: float
    call: float
    step: float
    tracing: float
    linearising: float
    short_pass: float
    all_pairs: float
    leading_pairs: float
    passes: float = 2.0
    matrix_bandwidth: float = 3e10
    row: float = 2e-6

    def __post_init__(self) -> None:
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            check_real(value, field.name)
            if not value > 0.0:
                raise ValueError(f"{field.name}: a positive number, got {value!r}.")

    @classmethod
    def default(cls, device: torch.device | str) -> DeviceCosts:
        """Return what is assumed of a device of its type."""
        return CPU_COSTS if as_device(device).type == "cpu" else GPU_COSTS

    @classmethod
    def on(cls, device: torch.device | str) -> DeviceCosts:
        """Return what routes on a device are chosen by."""
        return costs_on(as_device(device))

    def use(self, device: torch.device | str) -> None:
        """Choose routes on a device by these costs, in this process from now on."""
        _in_use[_key(as_device(device))] = self

    @property
    def reading_flops(self) -> float:
        """Operations of a large matrix product in the time that a byte is read in."""
        return self.rate / self.bandwidth

    def flops(self, seconds: float) -> float:
        """Operations of a large matrix product in some seconds."""
        return self.rate * seconds


# Two cores: some 300 GFLOP/s, and 12 GB/s. What is known of a matrix was measured with
# one thread on an AMD EPYC, for 200 to 4,000 rows and 1, 5, 10 and 20 pairs of matrices
# with a few large eigenvalues, with a power law and without gaps: a product of ARPACK
# took 12 μs and its bytes at 60 GB/s (a megabyte) to 22 GB/s (64), LAPACK's ?syevr 13
# (500 rows) to 9 (2,000) n³ beside 2 μs a row.
CPU_COSTS = DeviceCosts(
    name="a CPU",
    rate=3e11,
    bandwidth=1.2e10,
    copying=float("inf"),
    call=1e9 / 3e11,
    step=1.2e-5,
    tracing=1e11 / 3e11,
    linearising=3e9 / 3e11,
    short_pass=3e7 / 3e11,
    all_pairs=40.0,
    leading_pairs=10.0,
)
# What calibrate() measured on an H100 (PyTorch 2.11, 16 cores): copies go to pageable
# memory of the host, and what is bound by calls takes Python's time. cuSOLVER has no
# solver for some of the pairs. A product with V Vᵀ on linearisations took 13 to 24
# forward passes by the rate.
GPU_COSTS = DeviceCosts(
    name="a GPU",
    rate=5.1e13,
    bandwidth=2.8e12,
    copying=1.7e9,
    call=1e-3,
    step=7e-4,
    tracing=0.27,
    linearising=5e-3,
    short_pass=1.25e-4,
    all_pairs=160.0,
    leading_pairs=160.0,
    passes=7.0,
    matrix_bandwidth=2.8e12,
    row=1e-9,  # in the others
)
_in_use: dict[str, DeviceCosts] = {}


def _key(device: torch.device) -> str:
    """Several GPUs of a machine may differ; cuda is the first of them."""
    return f"{device.type}:{device.index or 0}"


def costs_on(device: torch.device) -> DeviceCosts:
    """Return what routes on a device are chosen by, as :meth:`DeviceCosts.on`."""
    default = CPU_COSTS if device.type == "cpu" else GPU_COSTS
    return _in_use.get(_key(device), default) if _in_use else default
