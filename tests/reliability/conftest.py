from __future__ import annotations

from collections.abc import Iterator

import pytest

from tools.children import Children


@pytest.fixture(scope="session")
def children() -> Iterator[Children]:
    """Commands in processes of their own, which can be killed and whose storage can be made to fail."""
    with Children() as opened:
        yield opened


@pytest.fixture
def failing(children: Children) -> Children:
    """The same, where system calls can be made to fail."""
    if not children.has_faults:
        pytest.skip("needs gcc")
    return children
