"""Permission for code of others comes from the command line, never from the file that brings the
code.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from hfscale.config.load import load_config
from hfscale.config.permission import ALLOWED, CODE, PIPE, grant
from hfscale.errors import ConfigError, DataError
from hfscale.reports.show import show_config
from hfscale.run.run import Run
from hfscale.shards.open import open_manifest
from launch import run_dir
from launch.request import Request
from tests.launch.conftest import CONFIG, folder

__all__ = ["folder"]


@pytest.fixture
def evil(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config whose shards are the output of a command, and that permits it itself."""
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "state"))
    monkeypatch.setenv(ALLOWED, "")
    values = yaml.safe_load(CONFIG)
    values["data"] |= {
        "sources": [{"shards": f"pipe:touch {folder}/ran; cat {folder}/shards/{{}}"}],
        "allow_pipe": True,
        "cache": {"folder": str(folder / "cache")},
    }
    values["model"]["trust_remote_code"] = True
    (folder / "evil.yaml").write_text(yaml.safe_dump(values))
    return folder / "evil.yaml"


def permissions(path: Path, *overrides: str) -> tuple[bool, bool]:
    config = load_config(path, overrides).config
    return config.data.allow_pipe, config.model.trust_remote_code


def test_a_file_cannot_permit_what_it_brings(evil: Path):
    assert permissions(evil) == (False, False)
    assert permissions(evil, f"{PIPE}=true") == (True, False)
    assert permissions(evil, "data={seq_len: 32, allow_pipe: true}", f"{CODE}=true") == (True, True)
    assert permissions(evil, f"{PIPE}=false") == (False, False)
    (evil.parent / "more.yaml").write_text("extends: evil.yaml\n")
    assert permissions(evil.parent / "more.yaml") == (False, False)
    with pytest.raises(ConfigError, match="on the command line: no file can permit"):
        Run(Request(str(evil)).load().config).read(device_type="cpu")
    assert not (evil.parent / "ran").exists()
    Run(Request(str(evil), (f"{PIPE}=true",)).load().config).read(device_type="cpu")
    assert (evil.parent / "ran").exists()


def test_looking_runs_and_fetches_nothing(evil: Path):
    shown = show_config(evil, [f"{PIPE}=true"])
    assert "which looking does not do" in shown
    assert "which only the command line can" in show_config(evil)
    far = show_config(
        evil, ["data.sources.0.shards=http://127.0.0.1:1/x", "train.epochs=1", "train.steps=null"]
    )
    assert "not known before http://127.0.0.1:1/x is fetched" in far
    assert not (evil.parent / "ran").exists()


def test_a_run_that_was_started_with_it_goes_on_with_it_and_no_other_does(evil: Path):
    loaded = Request(str(evil), (f"{PIPE}=true", f"{CODE}=true")).load()
    with run_dir.locked(loaded.config.run_dir):
        config = run_dir.record(loaded, launcher="local", procs=1)
    assert permissions(config) == (True, True)
    strangers = evil.parent / "strangers"
    shutil.copytree(config.parent, strangers)
    assert permissions(strangers / "config.yaml") == (False, False)
    text = config.read_text()
    config.write_text(text.replace("/ran;", "/ran; id;"))  # whoever may write there
    assert permissions(config) == (False, True)
    config.write_text(text)
    [note] = (evil.parent / "state" / "hfscale" / "allowed").iterdir()
    assert note.stat().st_mode & 0o077 == 0
    note.write_text(json.dumps([1]))
    assert permissions(config) == (False, False)


def test_what_the_command_line_grants_holds_for_what_it_starts(evil: Path):
    assert grant([f"{PIPE} = True", "a=1", f"{CODE}=false"]) == ["a=1"]
    assert permissions(evil) == (True, False)


@pytest.mark.parametrize(
    "name",
    [
        *("x;id;.tar", "$(id).tar", "--use-compress-program=id.tar", "..%2fx.tar", "a?b.tar"),
        *("a#b.tar", "a\r\nb.tar", ".tar", "a b.tar", "é.tar", "../a.tar", "a.tar\n"),
    ],
)
def test_the_name_of_a_remote_shard_is_a_plain_name(folder: Path, name: str):
    file = folder / "shards" / "manifest.json"
    content = json.loads(file.read_text())
    content["shards"][0]["name"] = name
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match="letters, digits"):
        open_manifest(f"pipe:cat {folder}/shards/{{}}", folder=folder / "cache", allow_pipe=True)


@pytest.mark.parametrize(
    "override",
    [
        "data.sources.0.shards=http://alice:PASS@host/x",
        "model.pretrained=https://:PASS@host/x",
        "cluster.sbatch.comment='see http://a:PASS@b'",
        "data.sources.0.shards='pipe:curl http://alice:PASS@host/{}'",
    ],
)
def test_a_password_in_a_url_is_refused_and_not_repeated(folder: Path, override: str):
    with pytest.raises(ConfigError, match="netrc") as error:
        load_config("config.yaml", [override])
    assert "PASS" not in str(error.value)
    assert override.partition("=")[0] in str(error.value)


def test_a_file_that_is_no_config_is_not_printed(folder: Path):
    (folder / "secret.txt").write_text("hf_SECRET\n")
    (folder / "extends.yaml").write_text("extends: secret.txt\n")
    with pytest.raises(ConfigError, match=r"secret.txt:1") as error:
        load_config("extends.yaml")
    assert "SECRET" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("train.steps=true", "something else than true or false"),
        ("optim.lr=true", "something else"),
        ("optim.betas=[false, 0.9]", "something else"),
        ("data.lanes=true", "something else"),
        ("data.sources=[{shards: a, weight: false}]", "something else"),
        ("engine.compile=1", "true or false"),
        ("engine.compile=no", "true or false"),
        ("data.cross_document='yes'", "true or false"),
    ],
)
def test_true_is_no_number_and_a_number_is_not_true(folder: Path, override: str, wanted: str):
    with pytest.raises(ConfigError, match=f"should be {wanted}"):
        load_config("config.yaml", [override])
