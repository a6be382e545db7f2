"""Fixtures of the tests under other people's trainers."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True, scope="package")
def nothing_old_to_collect():
    """Trainers collect garbage whenever they start; looking through the libraries takes longer than their steps."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
