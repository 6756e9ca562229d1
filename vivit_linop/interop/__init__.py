"""To and from other packages: SciPy, curvlinops, BackPACK and laplace-torch.

A file each. These packages are imported when they are needed, and through names that
they make public.
"""

from vivit_linop.interop.backpack import from_backpack
from vivit_linop.interop.curvlinops import from_curvlinops
from vivit_linop.interop.scipy import from_scipy

__all__ = ["from_backpack", "from_curvlinops", "from_scipy"]
