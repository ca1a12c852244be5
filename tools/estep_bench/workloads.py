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
    Shape(1_000_000, 1024, 128, 0.85, ("spherical", "tied", "diag", "full"), ("spherical", "tied", "diag")),
    Shape(1_000_000, 16_384, 128, 0.85, ("spherical",)),
    Shape(500_000, 1024, 768, 0.35, ("spherical",)),
)
DATA = ("realistic", "noise", "separated")


@dataclass(frozen=True, eq=False)
class Workload:
    """Rows (n, D) float32 on the device, and a mixture that is a plausible fit of them."""

    data: str
    rows: Tensor
    mixture: Mixture
    frame: Frame


def draw_rows(data: str, shape: Shape, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Rows (n, D) float32 of a kind, and the means (K, D) that they scatter about where there are such."""
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    n, k, d = shape.n, shape.k, shape.d
    if data == "noise":
        return normal(n, d), None
    if data == "separated":
        means = 2 * normal(k, d)
        labels = torch.randint(0, k, (n,), generator=generator, device=device)
        return normal(n, d).add_(means[labels]), means
    spectrum = torch.arange(1, d + 1, device=device, dtype=torch.float32) ** -shape.decay
    spectrum /= spectrum.square().mean().sqrt()
    rotation = torch.linalg.qr(normal(d, d))[0]
    contrast = torch.exp(0.15 * normal(n, 1))
    return (normal(n, d).mul_(spectrum).mul_(contrast)) @ rotation, None


def round_mixture(means: Tensor, variance: float, covariance_type: str) -> Mixture:
    """Equal weights, and ``variance`` in every direction, about ``means`` (K, D)."""
    k, d = means.shape
    one = np.eye(d) if covariance_type in ("tied", "full") else np.ones(())
    covariances = variance * np.broadcast_to(one, covariance_shape(covariance_type, k, d))
    return Mixture(np.full(k, 1 / k), means.double().cpu().numpy(), covariances, covariance_type)


def fitted(rows: Tensor, n_components: int, covariance_type: str) -> tuple[Mixture, Frame]:
    """Three EM iterations in plain float32, so that no kernel under test has a say in what it is tested on.

    They start halfway between random rows and their mean: at the rows themselves, those of least norm would attract
    everything and leave every other component its own row. The regularisation keeps outliers from such an end.
    """
    frame = frame_of(rows[:32_768].cpu().numpy(), covariance_type)
    generator = torch.Generator(device=rows.device).manual_seed(1)
    chosen = torch.randperm(len(rows), generator=generator, device=rows.device)[:n_components]
    means = torch.lerp(rows[:32_768].mean(0), rows[chosen], 0.5)
    variance = float(torch.cdist(rows[:4096], means).amin(1).square().mean()) / rows.shape[1]
    mixture = round_mixture(means, variance, covariance_type)
    for _ in range(EM_ITERATIONS):
        statistics, _ = DenseEStep(mixture, frame, rows.device)(rows)
        mixture = m_step(frame.restore(statistics), 0.05, mixture).mixture
    return mixture, frame


def workload(data: str, rows: Tensor, means: Tensor | None, n_components: int, covariance_type: str) -> Workload:
    """Rows with their own parameters where those are known, or else with fitted ones."""
    if means is None:
        return Workload(data, rows, *fitted(rows, n_components, covariance_type))
    mixture = round_mixture(means, 1.0, covariance_type)
    return Workload(data, rows, mixture, frame_of(rows[:32_768].cpu().numpy(), covariance_type))


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
