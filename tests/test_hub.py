"""A name is a folder here or the hub's; what is neither is said so."""

from __future__ import annotations

from pathlib import Path

import pytest

from hfscale.errors import ConfigError
from hfscale.hub import local_folder


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert local_folder(str(tmp_path), where="model.pretrained") == tmp_path


@pytest.mark.parametrize(
    "name", ["nobody/has-this-model", "./no/such/folder", "runs/nowhere", "äöü"]
)
def test_what_is_nowhere_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="neither a folder here") as error:
        local_folder(name, where="model.pretrained")
    assert "model.pretrained" in str(error.value) and name in str(error.value)
