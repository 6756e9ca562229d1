"""Where operators are entered, and the numbers that they are made of."""

import torch

from tests import placing

MARKET = {}


def entry(builder):
    """Put a builder on the market under its name."""
    MARKET[builder.__name__] = builder
    return builder


def build(name, dtype, device=None):
    """Return an operator of the market and its matrix, by default where tests run."""
    return MARKET[name](Draw(dtype, device))


class Draw:
    """Draws the tensors that operators are made of, always the same ones.

    By default they lie where tests run.

    Args:
        size: What all numbers are multiplied by.
    """

    def __init__(self, dtype, device=None, seed=0, size=1.0):
        self.dtype, self.size = dtype, size
        self.device = placing.device() if device is None else device
        self._generator = torch.Generator().manual_seed(seed)

    def _noise(self, *shape):
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)

    def _given(self, numbers):
        return (self.size * numbers).to(self.device, self.dtype)

    def __call__(self, *shape):
        return self._given(self._noise(*shape))

    def regular(self, n):
        """A square matrix that is not symmetric and far from singular."""
        noise = self._noise(n, n) / n**0.5 + 3 * torch.eye(n, dtype=torch.float64)
        return self._given(noise)

    def symmetric(self, n):
        """A symmetric matrix with eigenvalues of both signs, none near zero."""
        Q = torch.linalg.qr(self._noise(n, n)).Q
        evals = torch.linspace(1, 2, n, dtype=torch.float64)
        evals[::2] *= -1
        A = (Q * evals) @ Q.T
        return self._given((A + A.T) / 2)

    def definite(self, n):
        """A symmetric matrix with eigenvalues of at least one."""
        noise = self._noise(n, n)
        A = noise @ noise.T / n + torch.eye(n, dtype=torch.float64)
        return self._given((A + A.T) / 2)

    def entries(self, n):
        """Numbers of both signs, none near zero."""
        noise = self._noise(n)
        return self._given(noise + noise.sign())

    def eye(self, n):
        return torch.eye(n, dtype=torch.float64, device=self.device)


def khatri_rao_of(left, right):
    """The column-wise Khatri–Rao product, a Kronecker product a column."""
    pairs = zip(left.double().T, right.double().T, strict=True)
    return torch.stack([torch.kron(b, a) for b, a in pairs], dim=1)


def scattered(blocks, indices, n):
    """A matrix with blocks at the given rows and columns."""
    result = torch.zeros(n, n, dtype=torch.float64, device=blocks[0].device)
    for block, index in zip(blocks, indices, strict=True):
        result[index[:, None], index] = block.double()
    return result
