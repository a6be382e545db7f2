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

    def make(**overrides: object) -> SlimeConfig:
        return SlimeConfig(
            **{
                "output_dir": str(tmp_path / "out"),
                "per_device_train_batch_size": 4,
                "max_steps": 2,
                "learning_rate": 1e-3,
                "logging_steps": 1,
                "save_strategy": "no",
                "gradient_checkpointing": False,
                "disable_tqdm": True,
                "use_cpu": True,
                "seed": 3,
                **overrides,
            }
        )

    return make
