"""A language model on shards: the loss that training saw, perplexity, bits a byte; kept, and found
again.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from hfscale.config.load import to_yaml
from hfscale.config.schema import RunConfig
from hfscale.dist.world import World
from hfscale.errors import ConfigError
from hfscale.jobs import export
from hfscale.jobs.shards import settle
from hfscale.run.model import find
from hfscale.run.run import Run
from hfscale.run.sources import token_rows
from hfscale.run.tokens import held_out_rows
from launch.commands.evaluate import evaluate
from tests.helpers.corpus import run_values
from tests.helpers.ranks import run_ranks
from tests.helpers.training import train

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("together", [True, False])
def test_held_out_rows_know_their_documents_where_these_are_kept_apart(
    corpus: Path, tmp_path: Path, together: bool
) -> None:
    """In training and when evaluated: else a model that never saw two documents at once would be
    asked to.
    """
    config = RunConfig.model_validate(
        run_values(corpus, tmp_path, "run", data={"cross_document": together})
    )
    objective = Run(config).shape.objective
    tokens = token_rows(str(corpus / "shards" / "validation"), config)
    rows, *_ = held_out_rows(tokens, config, objective, World(), count=4)
    assert (objective.collate(rows).document_ids_BT is None) == together


def test_a_pretrained_model_on_shards(
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shards = str(corpus / "shards" / "validation")
    values = run_values(
        corpus,
        tmp_path,
        "run",
        data={"validation": {"shards": shards, "rows": 37, "every_steps": 6}},
    )
    logged = run_ranks(train, 2, values)[0][-1]
    run = tmp_path / "run"
    (run / "config.yaml").write_text(to_yaml(RunConfig.model_validate(values)))
    evaluate(str(run))
    assert "perplexity" in capsys.readouterr().out
    [file] = (run / "evaluations" / "shards").glob("step-00000006-*/scores.json")
    found = json.loads(file.read_text())
    assert (
        found["scores"]["loss"] == pytest.approx(logged["validation_loss"], rel=1e-5)
        and found["examples"] == 37
    )
    assert found["scores"]["perplexity"] == pytest.approx(math.exp(found["scores"]["loss"]))
    assert 0 < found["scores"]["bits_per_byte"] < found["scores"]["loss"] / math.log(2), (
        "a token has more than a byte"
    )
    low, high = found["intervals"]["loss"]
    assert low < found["scores"]["loss"] < high
    assert settle(find(run), None, []).evaluate.out == file.parent
    before = file.read_bytes()
    file.unlink()
    evaluate(
        str(run),
        [
            "engine.zero_stage=3",
            "engine.extra={zero_optimization: {stage3_param_persistence_threshold: 0}}",
        ],
        procs=2,
    )
    split = json.loads(file.read_text())
    assert split == json.loads(before) | {
        "scores": pytest.approx(found["scores"], rel=1e-6),
        "intervals": split["intervals"],
    }
    export.run(str(run), tmp_path / "exported")
    monkeypatch.chdir(tmp_path)
    evaluate(
        str(tmp_path / "exported"), ["data.seq_len=32", "data.cross_document=true"], data=[shards]
    )
    [theirs] = tmp_path.glob("evaluations/shards/exported-*/scores.json")
    assert json.loads(theirs.read_text())["examples"] > 37
    before = settle(find(tmp_path / "exported"), shards, []).evaluate.out
    os.utime(tmp_path / "exported" / "model.safetensors", (1, 1))
    assert settle(find(tmp_path / "exported"), shards, []).evaluate.out != before, (
        "another model in the same place: other scores"
    )
    with pytest.raises(ConfigError, match="nothing says on what"):
        settle(find(tmp_path / "exported"), None, [])
