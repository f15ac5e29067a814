"""What a run cannot keep it does not train: a save, a load and an export are tried before step 1,
for every architecture alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hfscale.errors import UserError
from tests.helpers.corpus import run_values
from tests.helpers.pretraining import extended_tokenizer
from tests.helpers.ranks import run_ranks
from tests.helpers.training import train

pytestmark = pytest.mark.slow
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
# fails in a forward that fills its cache
BAMBA = {
    **SIZES,
    "num_hidden_layers": 2,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
}
# has a buffer whose precision the architecture chose
RECURRENT_GEMMA = {
    **SIZES,
    "num_hidden_layers": 3,
    "head_dim": 16,
    "lru_width": 32,
    "attention_window_size": 16,
}


def values(corpus: Path, root: Path, architecture: str, config: dict[str, Any]) -> dict[str, Any]:
    return run_values(
        corpus,
        root,
        "run",
        model={"architecture": architecture, "config": config},
        engine={"zero_stage": 3, "precision": "fp32"},
        train={"steps": 2, "global_batch": 4, "micro_batch": 2},
        checkpoint={"every_steps": 2, "every_minutes": None},
    )


def outcome(values: dict[str, Any]) -> str:
    """Return how a run ends on this rank: what it was refused for, or nothing. For
    ``run_ranks``.
    """
    try:
        train(values)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("architecture", "config"), [("bamba", BAMBA), ("recurrent_gemma", RECURRENT_GEMMA)]
)
def test_it_is_saved_and_is_the_model_that_leaves(
    corpus: Path, tmp_path: Path, architecture: str, config: dict[str, Any]
) -> None:
    assert run_ranks(outcome, 2, values(corpus, tmp_path, architecture, config)) == ["", ""]
    assert (tmp_path / "run/checkpoints/step-00000002/manifest.json").is_file()
    assert not (tmp_path / "run/trial").exists()


def test_what_transformers_would_load_otherwise_is_refused_before_step_1(
    corpus: Path, tmp_path: Path
) -> None:
    """Funnel's padding row is set to zero when it is loaded: an export would be another model than
    was trained.
    """
    sizes = {"d_model": 32, "d_inner": 48, "n_head": 2, "d_head": 16, "num_decoder_layers": 1}
    blocks = {"block_sizes": [1, 1], "block_repeats": [1, 1]}
    wanted = values(corpus, tmp_path, "funnel", {**sizes, **blocks})
    wanted["objective"] = {"name": "mlm"}
    wanted["tokenizer"] = {"path": str(extended_tokenizer(corpus, tmp_path / "tokenizer"))}
    said = run_ranks(outcome, 2, wanted)
    assert said[0] == said[1]
    assert "cannot be exported as it would be trained" in said[0], said[0]
    assert not (tmp_path / "run/checkpoints").exists()
