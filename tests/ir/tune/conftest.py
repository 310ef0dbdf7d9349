"""The network and the data that the tests of the tuning engine share, as fixtures."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from models.tune_net import fresh, images, table, traced

import graphwright as gw
from graphwright.ir.data.batches import Batches


@pytest.fixture
def program() -> gw.Program:
    return traced(fresh(), 4, 1, 4, 4)


@pytest.fixture
def data(program: gw.Program) -> Callable[[int], Batches]:
    """Training data in batches of the given size."""
    x, labels = images()
    return lambda size: table(program.signature, x, labels, size)
