"""Vectors of text: paragraphs of the documentation of the packages installed beside this one."""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

_SUFFIXES = (".py", ".pyi", ".txt", ".md", ".rst", "")
_SHORTEST = 40
_LARGEST_FILE = 1 << 20


def paragraphs() -> list[str]:
    """Distinct paragraphs of at least 40 characters in docstrings, comments and text files, in the order found."""
    root = Path(sysconfig.get_paths()["purelib"])
    found: dict[str, None] = {}
    for path in sorted(root.rglob("*")):
        if path.suffix in _SUFFIXES and path.is_file() and path.stat().st_size <= _LARGEST_FILE:
            for text in _texts(path):
                found.update(dict.fromkeys(_split(text)))
    return list(found)


def text_vectors(dimensions: int = 32) -> np.ndarray:
    """TF-IDF of the paragraphs on its leading singular vectors, rows of unit norm before the projection."""
    weights = TfidfVectorizer(sublinear_tf=True, min_df=5, max_df=0.1, token_pattern=r"[A-Za-z]{2,}")
    matrix = weights.fit_transform(paragraphs())
    rows = TruncatedSVD(dimensions, random_state=0, n_iter=3).fit_transform(matrix)
    return np.asarray(rows[np.linalg.norm(rows, axis=1) > 1e-3], dtype=np.float32)


def _texts(path: Path) -> Iterator[str]:
    try:
        text = path.read_text()
    except (UnicodeDecodeError, OSError):
        return
    if path.suffix not in (".py", ".pyi"):
        yield text
        return
    # Runs of comment lines are paragraphs too.
    yield "\n\n".join(re.sub(r"(?m)^\s*#+ ?", "", run) for run in re.findall(r"(?m)(?:^\s*#.*\n)+", text))
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _split(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        joined = " ".join(paragraph.split())
        if len(joined) >= _SHORTEST:
            yield joined
