"""Data that a run cannot take is refused on one screen with exit code 2: what, where, the value and
what to do. Nothing is executed.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hfscale.config.load import load_config, to_yaml
from hfscale.errors import DataError
from hfscale.log import logger
from hfscale.shards.manifest import Manifest
from hfscale.shards.raw import index_tars
from launch.cli import main
from tests.helpers.corpus import run_values
from tests.helpers.ranks import run_ranks
from tests.helpers.training import train
from tests.shards.test_verify import write_tar

pytestmark = pytest.mark.slow

Refuse = Callable[..., str]
SHORT = {"steps": 1, "global_batch": 4, "micro_batch": 4}


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Refuse]:
    """The command line in this process: return what it says when it refuses, after checking that it
    does so in form.
    """

    def run(*arguments: object) -> str:
        monkeypatch.setattr("sys.argv", ["hfscale", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr().err
        assert end.value.code == 2, said
        assert re.search(r"^error: \w", said, re.MULTILINE) and "  remedy: " in said, said
        # a config's mistakes are listed by line
        assert "  where:  " in said or re.search(r"run\.yaml:\d+: data\.", said), said
        assert "Traceback" not in said and said.count("\n") < 15
        return said

    # which the command sets for its own process
    before = (
        logger.handlers[:],
        logger.level,
        logger.propagate,
    )
    yield run
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture
def sides(corpus: Path, tmp_path: Path) -> dict[str, Path]:
    """Copies of the corpus' two sides, to be spoilt."""
    shards = {"big": "train", "small": "validation"}
    return {
        name: Path(shutil.copytree(corpus / "shards" / side, tmp_path / name))
        for name, side in shards.items()
    }


def write(corpus: Path, folder: Path, sources: list[dict[str, Any]], **data: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(
        yaml.safe_dump(
            run_values(
                corpus, folder / "runs", "run", data={"sources": sources, **data}, train=SHORT
            )
        )
    )
    return path


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("second", "data", "words"),
    [
        ({"weight": 0}, {"stages": []}, "the weights sum to nothing"),
        ({"name": "big"}, {}, "two sources are named big"),
        (
            {},
            {"lanes": 10**6},
            r"more lanes than rows[\s\S]*data\.lanes[\s\S]*1000000[\s\S]*holds "
            r"only [\d,]+ rows",
        ),
        (
            {},
            {"stages": [{"at": 3, "weights": {"bgi": 1}}]},
            "there is no source bgi; did you mean big",
        ),
        ({"weight": 1e-9}, {}, r"the weight of small is too small[\s\S]*1e-09[\s\S]*data\.block"),
    ],
)
def test_sources_that_say_nothing_or_too_much(
    corpus: Path,
    sides: dict[str, Path],
    tmp_path: Path,
    refuse: Refuse,
    second: dict[str, Any],
    data: dict[str, Any],
    words: str,
) -> None:
    first = {
        "name": "big",
        "shards": str(sides["big"]),
        "weight": 0 if "weight" in second and not second["weight"] else 1,
    }
    path = write(
        corpus,
        tmp_path,
        [first, {"name": "small", "shards": str(sides["small"]), **second}],
        **data,
    )
    assert re.search(words, refuse("pretrain", path, "--dry-run", "--procs", 1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shards": []}, r"an empty source[\s\S]*small[\s\S]*value:  0"),
        (
            {"dtype": "uint32"},
            r"unlike dtypes[\s\S]*'uint16': 'big', 'uint32': 'small'[\s\S]*one "
            r"tokenizer gives one dtype",
        ),
        (
            {"tokenizer": {"digest": "f" * 64, "vocab_size": 512, "eod_id": 0}},
            r"another tokenizer[\s\S]*small[\s\S]*f{16}, not [0-9a-f]{16}",
        ),
        ({"tokenizer": None}, r"token shards name their tokenizer[\s\S]*small"),
        ({"version": 7}, r"unknown version[\s\S]*small[\s\S]*7"),
    ],
)
def test_sources_that_do_not_fit_together(
    corpus: Path,
    sides: dict[str, Path],
    tmp_path: Path,
    refuse: Refuse,
    changes: dict[str, Any],
    words: str,
) -> None:
    edit(sides["small"], **changes)
    path = write(
        corpus, tmp_path, [{"name": name, "shards": str(folder)} for name, folder in sides.items()]
    )
    assert re.search(words, refuse("pretrain", path, "--dry-run", "--procs", 1))


def refused_on_each_rank(values_of_ranks: list[dict[str, Any]]) -> str:
    """Return what a rank says whose node has files of its own; for ``run_ranks``."""
    with pytest.raises(DataError) as error:
        train(values_of_ranks[int(os.environ["RANK"])])
    return str(error.value)


@pytest.mark.parametrize("what", ["data.sources, text", "data.validation", "tokenizer.path"])
def test_nodes_with_different_copies_are_refused_on_every_rank(
    corpus: Path, sides: dict[str, Path], tmp_path: Path, what: str
) -> None:
    raw = write_tar(tmp_path / "raw" / "a.tar", {f"{k}.txt": b"a text" for k in range(4)}).parent
    index_tars([*raw.glob("*.tar")], folder=raw, field=None, threads=1)
    values = run_values(
        corpus,
        tmp_path,
        "run",
        train={**SHORT, "micro_batch": 2},
        data={"sources": [{"shards": str(raw)}], "validation": {"shards": str(sides["small"])}},
    )
    other = copy.deepcopy(values)
    if what == "tokenizer.path":  # which token shards would refuse by themselves
        del values["data"]["validation"], other["data"]["validation"]
        other["tokenizer"]["path"] = str(
            shutil.copytree(corpus / "tokenizer", tmp_path / "tokenizer")
        )
        file = tmp_path / "tokenizer" / "tokenizer.json"
        file.write_text(
            file.read_text("utf-8").replace(
                '"add_prefix_space": false', '"add_prefix_space": true'
            ),
            "utf-8",
        )
    elif what == "data.validation":
        other["data"]["validation"]["shards"] = str(sides["big"])
    else:
        other["data"]["sources"][0]["shards"] = str(sides["big"])
    first, second = run_ranks(refused_on_each_rank, 2, [values, other])
    assert first == second
    assert re.search(
        rf"different data[\s\S]*{what}[\s\S]*[0-9a-f]{{12}} on rank 0 \(.+\), [0-9a-f]{{12}} "
        rf"on rank 1 \(.+\)",
        first,
    ), first


@pytest.mark.parametrize("names", [("big",), ("big", "small")])
def test_a_resume_on_a_changed_manifest_names_what_has_changed(
    corpus: Path, sides: dict[str, Path], tmp_path: Path, refuse: Refuse, names: tuple[str, ...]
) -> None:
    path = write(corpus, tmp_path, [{"name": name, "shards": str(sides[name])} for name in names])
    run_ranks(train, 1, yaml.safe_load(path.read_text()))
    (tmp_path / "runs" / "run" / "config.yaml").write_text(to_yaml(load_config(path).config))
    folder = sides["big"]
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    assert len(shards) > 3
    first, second, *others = shards
    for changed, words in (
        ([*others, second], f"shards removed: 1, the first {first['name']}"),
        (
            [first, {**second, "digest": "0" * 64}, *others],
            f"shards changed: 1, the first {second['name']}",
        ),
        (
            [{**first, "name": "a.tar", "tokens": 99}, {**second, "max_id": 1}, *others],
            "shards added: 1, the first a.tar; shards removed: 1, the first "
            f"{first['name']}; shards changed: 1",
        ),
        ([second, first, *others], "the order of the shards"),
    ):
        edit(folder, shards=changed)
        # else files would be missing, which is said first
        for name in (shard["name"] for shard in changed):
            (folder / name).touch()
            (folder / name).with_suffix(".idx").touch()
        said = refuse("pretrain", path, "--dry-run", "--procs", 1)
        assert (
            "source big of the checkpoint has other data" in said
            and str(folder) in said
            and words in said
        ), said
    edit(folder, shards=shards, source={"description": "told otherwise"})
    assert "another source" in refuse("pretrain", path, "--dry-run", "--procs", 1)
    # a run of an older version: it still knows the fingerprint
    shutil.rmtree(tmp_path / "runs" / "run" / "data")
    assert re.search(
        r"value:  '[0-9a-f]{12} then, [0-9a-f]{12} now'",
        refuse("pretrain", path, "--dry-run", "--procs", 1),
    )


def test_a_run_keeps_the_manifests_that_it_was_trained_on(corpus: Path, tmp_path: Path) -> None:
    sources = [
        {"name": name, "shards": str(corpus / "shards" / name)} for name in ("train", "validation")
    ]
    run_ranks(train, 1, run_values(corpus, tmp_path, "run", data={"sources": sources}, train=SHORT))
    kept = {Manifest.load(folder).fingerprint for folder in (tmp_path / "run" / "data").iterdir()}
    assert kept == {Manifest.load(source["shards"]).fingerprint for source in sources}


class Bomb:
    """A pickle that makes a file when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("protocol", [0, 4])  # the first is plain ASCII
def test_pickles_in_a_tar_are_refused_and_never_opened(
    tmp_path: Path, refuse: Refuse, protocol: int
) -> None:
    bomb, mark = pickle.dumps(Bomb(tmp_path / "mark"), protocol), tmp_path / "mark"
    tar = write_tar(tmp_path / "raw.tar", {"a.pkl": bomb, "b.pkl": bomb})
    for field in ((), ("--field", "pkl")):
        said = refuse("shards", "index", tar, *field)
        assert re.search(r"raw\.tar, sample a[\s\S]*\['pkl'\][\s\S]*never a pickle", said)
    both = write_tar(tmp_path / "both.tar", {"a.txt": b"text", "a.pkl": bomb, "a.npy": bomb})
    (tmp_path / "corpus.yaml").write_text(
        yaml.safe_dump(
            {
                "source": {"format": "webdataset", "path": str(both), "field": "pkl"},
                "tokenizer": {"path": str(tmp_path / "tokenizer")},
                "shards": {"path": str(tmp_path / "shards")},
            }
        )
    )
    assert re.search(
        r"there is no field 'pkl'[\s\S]*both\.tar, sample a",
        refuse("tokenizer", "train", tmp_path / "corpus.yaml"),
    )
    assert not mark.exists()
    pickle.loads(bomb)
    assert mark.exists(), "the test's pickle does nothing"
