"""A language model on shards: the loss that training saw, perplexity, bits a byte; kept, and found again."""
from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from hfscale.config.load import to_yaml
from hfscale.config.schema import RunConfig
from hfscale.errors import ConfigError
from hfscale.jobs import export
from hfscale.jobs.evaluate import on_shards
from launch.commands.evaluate import evaluate
from tests.helpers.corpus import run_values
from tests.helpers.ranks import run_ranks
from tests.helpers.training import train

pytestmark = pytest.mark.slow


def test_a_pretrained_model_on_shards(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = str(corpus / "shards" / "validation")
    values = run_values(corpus, tmp_path, "run", data={"validation": {"shards": shards, "rows": 37, "every_steps": 6}})
    logged = run_ranks(train, 2, values)[0][-1]
    run = tmp_path / "run"
    (run / "config.yaml").write_text(to_yaml(RunConfig.model_validate(values)))
    evaluate(str(run))
    assert "perplexity" in capsys.readouterr().out
    [file] = (run / "evaluations" / "shards").glob("step-00000006-*/scores.json")
    found = json.loads(file.read_text())
    assert found["scores"]["loss"] == pytest.approx(logged["validation_loss"], rel=1e-5) and found["examples"] == 37
    assert found["scores"]["perplexity"] == pytest.approx(math.exp(found["scores"]["loss"]))
    assert 0 < found["scores"]["bits_per_byte"] < found["scores"]["loss"] / math.log(2), "a token has more than a byte"
    low, high = found["intervals"]["loss"]
    assert low < found["scores"]["loss"] < high
    assert on_shards(str(run), None, []) == (file.parent, found)
    export.run(str(run), tmp_path / "exported")
    theirs = on_shards(str(tmp_path / "exported"), shards, ["data.seq_len=32", "data.cross_document=true"])[1]
    assert theirs["examples"] > 37
    with pytest.raises(ConfigError, match="nothing says on what"):
        on_shards(str(tmp_path / "exported"), None, [])
