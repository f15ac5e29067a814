"""Tars of text made by others: whatever stock webdataset makes of them, so do we; what we cannot
read is named when it is indexed.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from hfscale.errors import DataError
from hfscale.shards.index import ShardIndex
from hfscale.shards.manifest import Manifest
from hfscale.shards.raw import encode_samples, index_tars, samples_of
from hfscale.shards.tars import name_at, walk
from hfscale.shards.verify import verify
from tests.helpers.cli import hfscale
from tests.shards.test_verify import write_tar

LONG = "很长的文件夹/" * 12 + "very-long-name-" * 12


class Bomb:
    """Its pickle does harm when it is opened."""

    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('a pickle was opened')",))


def write(path: Path, members: dict[str, bytes], *, form: int = tarfile.PAX_FORMAT) -> Path:
    """Return a tar of these members made by hand, with a folder, a link and other things that are
    no samples between them.
    """
    with tarfile.open(path, "w", format=form) as tar:
        for k, (name, content) in enumerate(members.items()):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
            if k == 0:
                for other, kind in (
                    ("folder.txt", tarfile.DIRTYPE),
                    ("link.txt", tarfile.SYMTYPE),
                    ("hard.txt", tarfile.LNKTYPE),
                ):
                    info = tarfile.TarInfo(other)
                    info.type, info.linkname = kind, name
                    tar.addfile(info)
    return path


def texts(manifest: Manifest) -> list[str]:
    """Return the text of each sample, by way of what a run's processes do; an id is a character."""
    found = []
    for entry in manifest.shards:
        members = ShardIndex.load(manifest.folder / entry.index_name).members
        samples = [
            (manifest.folder / entry.name, int(m["offset"]), int(m["bytes"]), int(m["checksum"]))
            for m in members
        ]
        ids, ends, damage = encode_samples(
            lambda texts: [np.array([ord(c) for c in text], "<u4") for text in texts],
            samples,
            manifest.source["field"],
            True,
            np.zeros(0, "<u4"),
        )
        assert not damage
        found += ["".join(map(chr, part)) for part in np.split(ids, ends[:-1])]
    return found


def stock(paths: list[Path], field: str) -> list[bytes]:
    return [
        sample[field]
        for path in sorted(paths)
        for sample in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    ]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_odd_names_are_read_as_webdataset_reads_them(tmp_path, form):
    long = (
        {}
        if form == tarfile.USTAR_FORMAT
        else {f"{LONG}.jpg": b"\xff", f"{LONG}.txt": "长".encode()}
    )
    path = write(
        tmp_path / "odd.tar",
        {
            "v1.0/a/one.jpg": b"\xff\xd8",
            "v1.0/a/one.txt": "一".encode(),
            "./two.TXT": b"two",
            "three.seg.txt": b"not this",
            "three.txt": b"three",
            "four.pickle": pickle.dumps(Bomb()),
            "four.pyd": pickle.dumps(Bomb()),
            "four.txt": b"",
            "noextension": b"x",
            "__meta__/x.txt": b"meta",
            "数据/五.txt": "五".encode(),
            **long,
            "six.cls": b"1",
            "six.txt": "\ufeff六".encode(),
        },
        form=form,
    )
    manifest = index_tars([path], folder=tmp_path, field="txt", threads=1)
    expected = [text.decode("utf-8-sig") for text in stock([path], "txt")]
    assert (
        texts(manifest)
        == expected
        == ["一", "two", "three", "", "五", *(["长"] if long else []), "六"]
    )
    names = {member.offset: member.name for member in walk(path)}
    assert all(name_at(path, offset) == name for offset, name in names.items())


def test_tars_of_stock_webdataset(tmp_path):
    documents = [{"text": f"文档 {k}\n\u2028 end", "meta": {"n": k}} for k in range(7)]
    paths = []
    for kind in ("txt", "json"):
        paths.append(tmp_path / f"{kind}.tar")
        with webdataset.TarWriter(str(paths[-1])) as tar:
            for k, document in enumerate(documents):
                tar.write(
                    {
                        "__key__": f"d{k}",
                        "npy": np.arange(3),
                        **({"txt": document["text"]} if kind == "txt" else {"json": document}),
                    }
                )
    plain, fielded = (
        index_tars([path], folder=tmp_path / path.stem, field=None, threads=1) for path in paths
    )
    assert [plain.source["field"], fielded.source["field"]] == ["txt", "json.text"], (
        "found in the first sample"
    )
    assert texts(plain) == texts(fielded) == [document["text"] for document in documents]
    assert stock(paths[:1], "txt") == [document["text"].encode() for document in documents]
    assert plain.fingerprint != fielded.fingerprint


def test_a_place_in_json_goes_as_deep_as_its_dots(tmp_path):
    path = write(
        tmp_path / "x.tar", {"a.meta.json": json.dumps({"page": {"json": {"body": "深"}}}).encode()}
    )
    assert texts(
        index_tars([path], folder=tmp_path, field="meta.json.page.json.body", threads=1)
    ) == ["深"]


@pytest.mark.parametrize(
    ("members", "field", "says"),
    [
        ({"a.json": b"{}"}, "json.text", r"is not under 'json\.text'[\s\S]*member a\.json"),
        ({"a.json": b'{"text": 3}'}, "json.text", r"is no string: 3[\s\S]*member a\.json"),
        ({"a.json": b'{"text": null}'}, "json", "is no string: None"),
        ({"a.json": b'{"text": "\\ud800"}'}, "json", "is not UTF-8"),
        ({"a.json": b"[1"}, "json", "is not in JSON"),
        ({"a.json": b"[1]"}, "json", "not an object"),
        ({"a.txt": "é".encode("latin-1")}, "txt", r"is not UTF-8[\s\S]*member a\.txt"),
        # one key, as for webdataset
        (
            {"doc.1.txt": b"x", "doc.2.txt": b"y"},
            "txt",
            r"no text[\s\S]*sample doc[\s\S]*'1\.txt', " r"'2\.txt'",
        ),
        ({"a.txt": b"x", "b.jpg": b"y"}, "txt", r"no text[\s\S]*sample b[\s\S]*'jpg'"),
    ],
)
def test_what_has_no_text_is_refused_by_name(tmp_path, members, field, says):
    with pytest.raises(DataError, match=says):
        index_tars([write(tmp_path / "x.tar", members)], folder=tmp_path, field=field, threads=1)
    assert not (tmp_path / "manifest.json").exists()


def test_a_compressed_tar_says_unpack(tmp_path):
    path = write(tmp_path / "x.tar", {"a.txt": b"x"})
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        tar.add(path, "x")
    done = hfscale("shards", "index", tmp_path / "x.tar.gz", check=False)
    assert done.returncode == 2 and "must be unpacked" in done.stderr


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"shards": [{"documents": 4}]}, "the index counts 3 samples, the manifest 4"),
        ({"source": {"field": "json.text"}}, "member 0.txt at offset 512: the text is not in JSON"),
        ({"source": {}}, "the manifest is damaged: raw text names the field that holds it"),
    ],
)
def test_a_wrong_manifest_is_found(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    tar = write_tar(tmp_path / "a.tar", {f"{k}.txt": b"a text" for k in range(3)})
    index_tars([tar], folder=tmp_path, field=None, threads=1)
    content = json.loads((tmp_path / "manifest.json").read_text())
    if "shards" in change:
        change = {"shards": [content["shards"][0] | change["shards"][0]]}
    (tmp_path / "manifest.json").write_text(json.dumps(content | change))
    with pytest.raises(DataError, match=re.escape(says)):
        raise DataError("\n".join(verify(Manifest.load(tmp_path), threads=1)))
    if "shards" in change:
        with pytest.raises(DataError, match=re.escape(says)):
            samples_of(tmp_path, Manifest.load(tmp_path).shards[0])
