"""What is claimed when a region is replaced by ReLU: how far off, where, and in which arithmetic."""

from __future__ import annotations

import dataclasses

EXACT = "bit for bit"


def is_exact(note: str) -> bool:
    """Whether the text of a certificate claims that not one bit changes."""
    return note.endswith(EXACT)


@dataclasses.dataclass(frozen=True)
class Certificate:
    """``|region(x) - relu(x)| <= eps`` for every ``x`` with ``|x| <= limit``, in real arithmetic; and what floats add.

    Attributes:
        eps: Bound in real arithmetic, tensor units; 0 for an identity of functions.
        limit: Largest magnitude of ``x`` covered, tensor units.
        dtype: Float type of the tensor, such as ``float32``.
        whole: Whether ``limit`` is the largest finite number of that type.
        rounding: Bound of what rounding in the *original* adds, relative to ``max(|x|, 1)``; 0 when its floats are
            exact too. The Relu that replaces it does not round.

    >>> print(Certificate(eps=0.0, limit=3.4028234663852886e38, dtype="float32", whole=True, rounding=0.0))
    equals ReLU for every finite float32, bit for bit
    """

    eps: float
    limit: float
    dtype: str
    whole: bool
    rounding: float

    def __str__(self) -> str:
        where = f"every finite {self.dtype}" if self.whole else f"|x| <= {self.limit:.4g} ({self.dtype})"
        claim = f"equals ReLU for {where}" if self.eps == 0 else f"within {self.eps:.3g} of ReLU for {where}"
        if self.rounding == 0:
            return f"{claim}, {EXACT}" if self.eps == 0 else claim
        return f"{claim} in exact arithmetic; the original's own rounding is at most {self.rounding:.2g} max(|x|, 1)"
