"""Tests here train and run torch models; see the fixture."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def one_thread():
    """Several test processes with a pool of spinning threads each are many times slower than with one thread each."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
