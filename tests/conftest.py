"""Fixtures of the tests that train. Their libraries load when first asked for: most tests need none of them."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def tokenizer():
    from tests.tiny_models import make_tokenizer

    return make_tokenizer()


@pytest.fixture
def model(tokenizer):
    from tests.tiny_models import tiny_llama

    return tiny_llama(len(tokenizer))


@pytest.fixture
def make_args(tmp_path):
    from slime_fused.trainer import SlimeConfig
    from tests.tiny_models import quick_settings

    def make(**overrides: object) -> SlimeConfig:
        return SlimeConfig(**quick_settings(tmp_path / "out", **{"seed": 3, **overrides}))

    return make
