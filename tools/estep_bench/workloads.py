"""Rows, and the parameters they meet."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from streamgmm.frame import Frame, frame_of
from streamgmm.kernels.tiled import TiledKernel
from streamgmm.mixture import Mixture, covariance_shape
from streamgmm.mstep import m_step

from .dense import DenseEStep
from .session import Record

LIVENESS_ROWS = 4096
EM_ITERATIONS = 3
TILE = 64
"""Components of the tiles that ``live tiles`` counts; a kernel's own tiles may be wider."""


@dataclass(frozen=True)
class Shape:
    """One size of problem; ``decay`` is the exponent of the realistic rows' spectrum, tuned for their overlap."""

    n: int
    k: int
    d: int
    decay: float
    covariance_types: tuple[str, ...]
    high: tuple[str, ...] = ()

    def shrunk(self, rows: int) -> Shape:
        """The same on at most ``rows`` rows, with as many components as they support."""
        return self if rows >= self.n else replace(self, n=rows, k=max(2, min(self.k, rows // 16)))


SHAPES = (
    Shape(1_000_000, 1024, 128, 0.85, ("spherical", "diag", "full", "tied"), ("spherical", "diag", "tied")),
    Shape(1_000_000, 16_384, 128, 0.85, ("spherical",)),
    Shape(500_000, 1024, 768, 0.35, ("spherical",)),
)
DATA = ("realistic", "noise", "separated")
_CONTRAST = 0.15
# Deviation of clusters' means in units of their noise, and the exponent of its spectrum: tuned for their overlap.
_SPREAD, _SPREAD_DECAY = 0.95, 0.75


@dataclass(frozen=True, eq=False)
class Workload:
    """Rows (n, D) float32 on the device, and a mixture that is a plausible fit of them."""

    data: str
    rows: Tensor
    mixture: Mixture
    frame: Frame


@dataclass(frozen=True, eq=False)
class Drawn:
    """Rows (n, D) float32 of a recipe; and, where they form clusters, means (K, D) and a covariance (D, D) if not I."""

    recipe: str
    rows: Tensor
    means: Tensor | None = None
    covariance: Tensor | None = None


def recipe_of(data: str, covariance_type: str) -> str:
    """How ``data`` is drawn. A common covariance explains realistic rows unless they form clusters."""
    return "correlated clusters" if data == "realistic" and covariance_type == "tied" else data


def draw_rows(recipe: str, shape: Shape, device: torch.device) -> Drawn:
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    def power_law(decay: float) -> Tensor:
        spectrum = torch.arange(1, d + 1, device=device, dtype=torch.float32) ** -decay
        return spectrum / spectrum.square().mean().sqrt()

    n, k, d = shape.n, shape.k, shape.d
    if recipe == "noise":
        return Drawn(recipe, normal(n, d))
    if recipe == "separated":
        means = 2 * normal(k, d)
        labels = torch.randint(0, k, (n,), generator=generator, device=device)
        return Drawn(recipe, normal(n, d).add_(means[labels]), means)
    contrast = torch.exp(_CONTRAST * normal(n, 1))
    # From coordinates with unit noise to those of the data.
    colour = power_law(shape.decay)[:, None] * torch.linalg.qr(normal(d, d))[0]
    if recipe == "realistic":
        return Drawn(recipe, normal(n, d).mul_(contrast) @ colour)
    means = _SPREAD * (normal(k, d) * power_law(_SPREAD_DECAY)) @ torch.linalg.qr(normal(d, d))[0]
    labels = torch.randint(0, k, (n,), generator=generator, device=device)
    rows = normal(n, d).add_(means[labels]).mul_(contrast) @ colour
    return Drawn(recipe, rows, means @ colour, colour.T @ colour)


def round_mixture(means: Tensor, variance: float, covariance_type: str) -> Mixture:
    """Equal weights, and ``variance`` in every direction, about ``means`` (K, D)."""
    k, d = means.shape
    one = np.eye(d) if covariance_type in ("tied", "full") else np.ones(())
    covariances = variance * np.broadcast_to(one, covariance_shape(covariance_type, k, d))
    return Mixture(np.full(k, 1 / k), means.double().cpu().numpy(), covariances, covariance_type)


def start_of(rows: Tensor, n_components: int, covariance_type: str) -> Mixture:
    """Means halfway between random rows and their mean.

    At the rows themselves, those of least norm would attract everything and leave every other component its own row.
    """
    generator = torch.Generator(device=rows.device).manual_seed(1)
    chosen = torch.randperm(len(rows), generator=generator, device=rows.device)[:n_components]
    means = torch.lerp(rows[:32_768].mean(0), rows[chosen], 0.5)
    variance = float(torch.cdist(rows[:4096], means).amin(1).square().mean()) / rows.shape[1]
    return round_mixture(means, variance, covariance_type)


def fitted(rows: Tensor, mixture: Mixture, frame: Frame, reg_covar: float) -> Mixture:
    """Three EM iterations in plain float32, so that no kernel under test has a say in what it is tested on."""
    for _ in range(EM_ITERATIONS):
        statistics, _ = DenseEStep(mixture, frame, rows.device)(rows)
        mixture = m_step(frame.restore(statistics), reg_covar, mixture).mixture
    return mixture


def workload(data: str, drawn: Drawn, n_components: int, covariance_type: str) -> Workload:
    """Rows with their own parameters where those are exact, or else with parameters fitted to them."""
    rows, means, covariance = drawn.rows, drawn.means, drawn.covariance
    frame = frame_of(rows[:32_768].cpu().numpy(), covariance_type)
    if means is None:
        start = start_of(rows, n_components, covariance_type)
        # The regularisation keeps outliers from a component of their own.
        return Workload(data, rows, fitted(rows, start, frame, 0.05), frame)
    mixture = round_mixture(means, 1.0, covariance_type)
    if covariance is None:
        return Workload(data, rows, mixture, frame)
    # Contrast makes the clusters' own parameters no fixed point; random rows would find half of the clusters.
    mixture = replace(mixture, covariances=covariance.double().cpu().numpy())
    return Workload(data, rows, fitted(rows, mixture, frame, 1e-6), frame)


def liveness(case: Workload) -> Record:
    """Components, and 64-component tiles, that hold more than ε = 2⁻²⁴/K of a row: means over some rows."""
    oracle = TiledKernel(torch.float64)
    k = case.mixture.n_components
    threshold = math.log(2.0**-24 / k)

    def count(joint: Tensor) -> Tensor:
        live = joint - joint.logsumexp(0) > threshold
        padded = torch.nn.functional.pad(live, (0, 0, 0, -k % TILE))
        return torch.stack([live.sum(0), padded.view(-1, TILE, live.shape[1]).any(1).sum(0)])

    parameters = oracle.parameters(case.mixture, case.frame, case.rows.device)
    counts = torch.cat(list(oracle.map_joint(count, case.rows[:LIVENESS_ROWS], parameters)), dim=1).double().mean(1)
    return {"live_components": float(counts[0]), "live_tiles": float(counts[1]) / -(-k // TILE)}


# --- Errors ---------------------------------------------------------------------------------------------------------
