"""Versions that give wrong numbers without a word are refused before anything starts."""

from __future__ import annotations

from importlib import metadata

import pytest

from hfscale.errors import ConfigError
from hfscale.packages import refuse_wrong_versions


@pytest.mark.parametrize(
    ("package", "version", "refused"),
    [
        ("deepspeed", "0.19.3", True),
        ("deepspeed", "0.19.7", True),
        ("deepspeed", "0.19.8", False),
        ("deepspeed", "0.19.8+cu130", False),
        ("tokenizers", "0.23.1", True),
        ("tokenizers", "0.23.2", True),
        ("tokenizers", "0.23.3", False),
        ("tokenizers", "0.22.2", False),
    ],
)
def test_a_version_that_is_known_to_be_wrong_is_refused(
    monkeypatch: pytest.MonkeyPatch, package: str, version: str, refused: bool
) -> None:
    installed = metadata.version
    monkeypatch.setattr(metadata, "version", lambda n: version if n == package else installed(n))
    if not refused:
        refuse_wrong_versions()
        return
    with pytest.raises(ConfigError, match=rf"{package} gives wrong numbers[\s\S]*pip install"):
        refuse_wrong_versions()
