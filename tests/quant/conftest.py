"""Every test of the codecs runs on every backend this machine has: NumPy, and each CPU level of the C kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import quant


@pytest.fixture(params=quant.BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend that runs during the test."""
    quant.use_backend(request.param)
    yield request.param
    quant.use_backend(None)
