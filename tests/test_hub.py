"""A name is a folder here or the hub's; what is neither is said so."""

from __future__ import annotations

from pathlib import Path

import pytest

from hfscale.errors import ConfigError
from hfscale.hub import local_folder, refuse_huge


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert local_folder(str(tmp_path), where="model.pretrained") == tmp_path


@pytest.mark.parametrize(
    "name", ["nobody/has-this-model", "./no/such/folder", "runs/nowhere", "äöü"]
)
def test_what_is_nowhere_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="neither a folder here") as error:
        local_folder(name, where="model.pretrained")
    assert "model.pretrained" in str(error.value) and name in str(error.value)


def test_a_folder_by_a_stranger_is_refused_by_file_and_key(tmp_path: Path):
    """None of these is opened by transformers: it would wait for ever, or make 10^9 layers."""
    import json
    import os

    for name, content, says in (
        ("config.json", {"architectures": [5]}, r"architectures\.0: .*not 5"),
        ("config.json", {"vocab_size": "x"}, "vocab_size: .*not 'x'"),
        ("config.json", {"n_layer": 10**9}, "no model has so many: n_layer"),
        ("config.json", {"text_config": {"num_experts": 10**9}}, "num_experts"),
        ("config.json", {"hfscale": {"task": 5}}, r"hfscale\.task"),
        ("generation_config.json", {"bos_token_id": {"x": 1}}, "bos_token_id"),
        ("config.json", None, "no regular file"),
        ("model.safetensors", None, "no regular file"),
        ("tokenizer.json", "[" * 100_000, "recursion limit"),
    ):
        folder = tmp_path / f"{len(os.listdir(tmp_path))}"
        folder.mkdir()
        if content is None:
            os.mkfifo(folder / name)
        else:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(ConfigError, match=says):
            local_folder(folder, where="MODEL")


def test_sizes_that_models_have_are_taken():
    refuse_huge(
        {"num_hidden_layers": 1000, "num_experts": 512, "n_ctx": 10**7, "num_labels": 10**6},
        where="config.json",
    )
