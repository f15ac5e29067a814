from __future__ import annotations

import pytest

from hfscale.config.schema import Best
from hfscale.metrics.better import lower_is_better


@pytest.mark.parametrize(
    ("figure", "mode"),
    [
        ("validation_loss", "min"),
        ("validation_loss_mlm", "min"),
        ("validation_perplexity", "min"),
        ("validation_bits_per_byte", "min"),
        ("validation_mse", "min"),
        ("validation_uniformity", "min"),
        ("validation_f1", "max"),
        ("validation_retrieval_accuracy", "max"),
    ],
)
def test_the_metric_says_which_way_is_better(figure: str, mode: str) -> None:
    assert Best(metric=figure).mode == mode
    assert lower_is_better(figure) == (mode == "min")
