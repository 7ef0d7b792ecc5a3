"""The papers' claims as formulas (GrAPE 2026, FDFA 2024), and those that the tests found missing.

No measuring here: what grapefx does is in ``measure.py``, and tests and figures compare the two.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sphere_mean(n: int) -> float:
    """E|s_1| on the sphere in R^n: Gamma(n/2) / (sqrt(pi) Gamma((n+1)/2)) (GrAPE 2026 B.2)."""
    return math.exp(math.lgamma(n / 2) - math.lgamma((n + 1) / 2)) / math.sqrt(math.pi)


def sphere_bound(n: int) -> float:
    """GrAPE 2026 eq. 11: E|s_1| >= sqrt(2 / (pi n))."""
    return math.sqrt(2 / (math.pi * n))


def cosine_bound(j: Tensor) -> float:
    """GrAPE 2026 eq. 4, 13: E[cos_F(J, J^)] >= sqrt(2 / (pi n)) |J|_2 / |J|_F, one sample."""
    singular = torch.linalg.svdvals(j)
    return float(sphere_bound(j.shape[1]) * singular[0] / singular.norm())


def cosine_bracket(n: int) -> tuple[float, float]:
    """E[cos_F(J, J^)] lies in [E|s_1|, 1 / sqrt(n)] whatever the spectrum; not in the papers.

    Above: E cos^2 = 1 / n. Below: |J s| / |J|_F = sqrt(sum w_i s_i^2) with weights w_i =
    sigma_i^2 / |J|_F^2 that sum to 1, and the root is concave, so it is >= sum w_i |s_i|.
    Eq. 4 has |J|_2 / |J|_F too much.
    """
    return sphere_mean(n), n**-0.5


def khintchine_bound(n: int) -> float:
    """E[cos_F(J, J^)] >= 1 / sqrt(2 n) for random signs, where eq. 4's constant does not hold.

    The same concavity as in ``cosine_bracket`` with E|v . s| >= |v| / sqrt(2) (Szarek 1976).
    """
    return (2 * n) ** -0.5


def noise_to_signal(n: int, noise: str, others: float = 0.0) -> float:
    """E|d v^T - J|_F^2 / |J|_F^2 of one sample's estimate.

    Gaussian: n + 1, random signs: n - 1. ``others``: sum of |J_m|_F^2 over the other layers in the
    same tangent pass, over |J|_F^2; each adds n times its own.
    """
    return n + (1 if noise == "gaussian" else -1) + n * others


def batch_cosine(ratio: float, samples: float) -> float:
    """Cosine between J and the mean of many estimates: (1 + ratio / samples)^(-1/2)."""
    return (1 + ratio / samples) ** -0.5


def composed(a: float, b: float) -> tuple[float, float]:
    """GrAPE 2026 lemma B.2: cos(B, J) lies in a b -+ sqrt(1 - a^2) sqrt(1 - b^2)."""
    slack = math.sqrt(max(0.0, 1 - a * a)) * math.sqrt(max(0.0, 1 - b * b))
    return a * b - slack, a * b + slack


def fgw_variance(gradient: Tensor) -> Tensor:
    """FDFA 2024 proposition 5: Var g_ij = g_ij^2 + |g|^2 for the gradient g of the perturbed
    weights.
    """
    return gradient**2 + (gradient**2).sum()


def fga_variance(delta: Tensor, local: Tensor, noise: str) -> Tensor:
    """FDFA 2024 proposition 6: Var g_ij = (delta_i^2 + |delta|^2) (dy_i/dw_ij)^2, for one sample.

    ``delta`` (n_1,) is dL/dy, ``local`` (n_1, n_0) is dy_i/dw_ij. With random signs v_i^2 = 1 has
    no variance, and the first sign is a minus.
    """
    sign = 1 if noise == "gaussian" else -1
    return ((delta**2).sum() + sign * delta**2)[:, None] * local**2


def fdfa_variance(delta: Tensor, local: Tensor, alpha: float, noise: str) -> Tensor:
    """FDFA 2024 proposition 2 with its misprints mended: alpha^2 times the variance of FG-A.

    Eq. 19 as printed has dy_o^(1)/dy_k^(1) and no sum over o with dL/dy_o.
    """
    return alpha**2 * fga_variance(delta, local, noise)


def running_factor(alpha: float) -> float:
    """Stationary variance of B <- (1 - a) B + a J^ over the variance of J^: a / (2 - a).

    Proposition 2 starts each step at B = W^(2) exactly and finds a^2; a map that runs carries the
    noise of earlier steps, sum_k a^2 (1 - a)^(2 k).
    """
    return alpha / (2 - alpha)
