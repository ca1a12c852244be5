"""Rows from the two photographs that ship with scikit-learn."""

from __future__ import annotations

import numpy as np
from scipy.fft import dctn
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_sample_images

_LUMA = np.array([0.299, 0.587, 0.114])
_CELLS, _CELL, _BINS = 4, 4, 8
SIFT_WIDTH = _CELLS * _CELL


def photographs() -> list[np.ndarray]:
    """Luminance of china.jpg and flower.jpg, (427, 640) fp64 in 0…255, dequantised by uniform noise of one grey level.

    Without the noise flat patches are exactly constant, and their density has no bound.
    """
    rng = np.random.default_rng(0)
    return [image @ _LUMA + rng.uniform(-0.5, 0.5, image.shape[:2]) for image in load_sample_images().images]


def image_patches() -> np.ndarray:
    """Every 8×8 patch as its 63 DCT coefficients without the mean, (536,000, 63): an orthonormal change of axes."""
    windows = [np.lib.stride_tricks.sliding_window_view(image, (8, 8)).reshape(-1, 8, 8) for image in photographs()]
    return np.concatenate(
        [dctn(window, axes=(1, 2), norm="ortho").reshape(-1, 64)[:, 1:].astype(np.float32) for window in windows]
    )


def dense_sift(dimensions: int = 32) -> np.ndarray:
    """`root_sift` at every pixel, projected on its leading axes."""
    descriptors = np.concatenate([root_sift(image)[0] for image in photographs()])
    centred = descriptors - descriptors.mean(0)
    vectors = np.linalg.eigh(centred.T @ centred / len(centred))[1]
    return np.asarray(centred @ vectors[:, ::-1][:, :dimensions], dtype=np.float32)


def root_sift(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Descriptors (n, 128) of windows of `SIFT_WIDTH` pixels at every pixel, and the first column of each, (n,).

    Lowe's histogram of gradient orientations over 4×4 cells of 4×4 pixels with 8 orientations shared between
    neighbouring bins, smoothed over cells by a Gaussian instead of trilinear weights, square-rooted (Arandjelović &
    Zisserman 2012): in NumPy, after the papers. Flat windows, whose descriptor is undefined, are left out.
    """
    dy, dx = np.gradient(gaussian_filter(image, 1.0))
    magnitude, angle = np.hypot(dx, dy), np.arctan2(dy, dx) % (2 * np.pi) * (_BINS / (2 * np.pi))
    histograms = []
    for orientation in range(_BINS):
        distance = np.abs(angle - orientation)
        share = np.clip(1 - np.minimum(distance, _BINS - distance), 0, None)
        histograms.append(gaussian_filter(magnitude * share, _CELL / 2))
    maps = np.stack(histograms, -1).astype(np.float32)
    height, width = (size - SIFT_WIDTH for size in image.shape)
    cells = [
        maps[i * _CELL : i * _CELL + height, j * _CELL : j * _CELL + width]
        for i in range(_CELLS)
        for j in range(_CELLS)
    ]
    rows = np.concatenate(cells, -1).reshape(height * width, -1)
    column = np.tile(np.arange(width), height)
    norm = np.linalg.norm(rows, axis=1)
    kept = norm > 10.0
    rows = np.minimum(rows[kept] / norm[kept, None], 0.2)
    return np.sqrt(rows / rows.sum(1, keepdims=True)), column[kept]
