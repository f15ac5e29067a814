"""Configs that no person writes: anchors that multiply, depth, size, names that no system takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from hfscale.config.load import load_config, read_tree
from hfscale.errors import ConfigError

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(9 * ['*' + below])}]\n"
    for below, name in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (LAUGHS, "more than 100,000 things"),
        ("a: &a {b: *a}", "the anchor a holds itself"),
        ("[" * 5000, "deeper than 50"),
        ("{a: " * 3000, "deeper than 50"),
        ("- " * 20_000 + "x", "deeper than 50"),
        ("x: 1\n" * 800_000, "more than 1 MB"),
        ("".join(f"k{n}: {{a: {n}}}\n" for n in range(60_000)), "more than 1"),
    ],
)
def test_what_would_take_hours_is_refused(tmp_path: Path, text: str, says: str):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_tree(file)


def test_anchors_of_a_person_still_work(tmp_path: Path):
    file = tmp_path / "config.yaml"
    file.write_text("a: &x {n: 1}\nb: [*x, *x]\nc: &y text\nd: *y\n")
    assert read_tree(file).values == {
        "a": {"n": 1},
        "b": [{"n": 1}, {"n": 1}],
        "c": "text",
        "d": "text",
    }


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("run.root=~nosuchuser/x", r"run.root: .*no home folder of ~nosuchuser"),
        ("run.root=" + "a" * 300, r"run.root: .*longer than 255 bytes"),
        ("tokenizer.path=" + "a" * 300, r"tokenizer.path: .*longer than 255 bytes"),
        ('run.name="a\\0b"', "run.name: .*holds NUL"),
        ('data.sources.0.name="\\ud800"', "half a character|invalid Unicode"),
        ("train.epochs=1e308", "train.epochs: .*less than or equal to 1000000000"),
        ("train.steps=99999999999999999999", "train.steps: .*less than"),
    ],
)
def test_values_that_no_system_takes_name_their_key(tmp_path: Path, override: str, says: str):
    file = Path(__file__).parents[2] / "configs" / "pretrain" / "gpt2_small.yaml"
    with pytest.raises(ConfigError, match=says):
        load_config(file, [override])


def test_a_pipe_is_no_config(tmp_path: Path):
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="no regular file"):
        load_config(tmp_path / "zero.yaml")
