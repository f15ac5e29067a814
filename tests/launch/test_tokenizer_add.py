"""``hfscale tokenizer add``: special tokens for an objective, and errors whose command runs as
printed.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from hfscale.config.schema import RunConfig
from hfscale.errors import ConfigError, DataError
from hfscale.run.run import Run
from hfscale.tokenizer import load_tokenizer, tokenizer_digest
from launch.commands.tokenizer import add
from tests.helpers.cli import hfscale
from tests.helpers.corpus import run_values

BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 600,
}
T5 = {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 48, "d_kv": 16}


def test_text_keeps_its_ids_and_special_tokens_get_roles(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "more"
    printed = hfscale(
        "tokenizer", "add", corpus / "tokenizer", out, "mask=<mask>", "pad=<pad>", "sentinels=3"
    ).stdout
    old, new = load_tokenizer(corpus / "tokenizer"), load_tokenizer(out)
    assert printed.split() == [str(len(old) + 5), "ids", str(out)]
    text = "def f(x):  # 文件 <mask>"
    assert new(text[:-6])["input_ids"] == old(text[:-6])["input_ids"]
    assert new(text)["input_ids"][-1] == new.mask_token_id == len(old)
    assert new.pad_token == "<pad>", (
        "the end of a document padded before: padding may get a token of its own"
    )
    assert new.eos_token == old.eos_token
    assert new.convert_tokens_to_ids("<extra_id_2>") == len(new) - 1
    assert tokenizer_digest(new) == tokenizer_digest(old), "shards stay good"
    with pytest.raises(ConfigError, match="exists already"):
        add(str(corpus / "tokenizer"), out, ["mask=<mask>"])
    with pytest.raises(DataError, match="has a mask token already"):
        add(str(out), tmp_path / "other", ["mask=[MASK]"])
    for wrong in ("masc=<mask>", "mask", "sentinels=many"):
        with pytest.raises(ConfigError, match="a token is written ROLE=TOKEN"):
            add(str(out), tmp_path / "other", [wrong])
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("objective", "model", "asked"),
    [
        (
            {"name": "contrastive", "options": {"pooling": "cls", "mlm_weight": 0.1}},
            {"architecture": "bert", "config": BERT},
            ["cls", "mask"],
        ),
        ({"name": "mlm"}, {"architecture": "roberta", "config": BERT}, ["mask", "pad"]),
        ({"name": "seq2seq"}, {"architecture": "t5", "config": T5}, ["sentinels"]),
        (
            {"name": "seq2seq", "options": {"noise": "bart"}},
            {"architecture": "t5", "config": T5},
            ["mask"],
        ),
    ],
)
def test_the_command_in_an_error_runs_as_printed(
    corpus: Path, tmp_path: Path, objective: dict[str, Any], model: dict[str, Any], asked: list[str]
) -> None:
    folder = tmp_path / "a tokenizer"
    load_tokenizer(corpus / "tokenizer").save_pretrained(folder)
    values, given = (
        run_values(
            corpus,
            tmp_path,
            "run",
            objective=objective,
            model=model,
            tokenizer={"path": str(folder)},
        ),
        [],
    )
    while True:
        try:
            Run(RunConfig.model_validate(values)).check()
            break
        except ConfigError as error:
            command, then = str(error).split("remedy: ")[1].split("\n")
            words = shlex.split(command)
            assert words[:3] == ["hfscale", "tokenizer", "add"]
            add(words[3], Path(words[4]), words[5:])
            given.append(words[5].split("=")[0])
            values["tokenizer"]["path"] = shlex.split(
                re.findall(r"tokenizer\.path=(.*);", then)[0]
            )[0]
    assert given == asked
