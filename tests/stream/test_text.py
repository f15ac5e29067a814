"""Raw text, tokenized on the fly, against a reader written naively: one process, every lane a
growing list of ids.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hfscale.checkpoint.state import CheckpointState
from hfscale.config.schema import RunConfig
from hfscale.dist.world import Place
from hfscale.encoding import Encoders
from hfscale.errors import ConfigError, DataError
from hfscale.shards.open import open_manifest
from hfscale.shards.raw import index_tars
from hfscale.stream import ahead, text
from hfscale.stream.loader import EvaluationRows, Stream
from hfscale.stream.rows import TokenRows
from hfscale.stream.sources import open_mixture
from hfscale.stream.text import HeldOutText, TextRows
from hfscale.tokenizer import load_tokenizer
from tests.helpers.corpus import run_values
from tests.helpers.web_server import eventually, serve

SEQ = 16
WORDS = [
    "def",
    "return",
    "import",
    "数据",
    "模型",
    "训练",
    "一个",
    "de",
    "la",
    "über",
    "self",
    "0x1f",
    "\n\t",
    "😀",
    "class",
]


def texts(count: int, *, seed: int, mean: float) -> list[str]:
    """Return ``count`` texts, some empty, some much longer than a row."""
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(WORDS, int(rng.exponential(mean)))) for _ in range(count)]


def write(folder: Path, shards: list[list[str]], *, field: str = "txt") -> Path:
    """Return ``folder`` with tars of these texts, written by stock webdataset, and their
    manifest.
    """
    folder.mkdir(parents=True)
    for number, shard in enumerate(shards):
        with webdataset.TarWriter(str(folder / f"raw-{number:03}.tar")) as tar:
            for k, text in enumerate(shard):
                tar.write(
                    {
                        "__key__": f"{number}/文-{k:04}",
                        "jpg": b"\xff\xd8",
                        **(
                            {"txt": text}
                            if field == "txt"
                            else {"json": {"url": "none", "page": {"body": text}}}
                        ),
                    }
                )
    index_tars(sorted(folder.glob("*.tar")), folder=folder, field=field, threads=2)
    return folder


@pytest.fixture(scope="module")
def tokenizer(corpus: Path) -> Any:
    return load_tokenizer(corpus / "tokenizer")


class Shared(Encoders):
    """Processes for all streams of this module: one does not end them for the others."""

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def encoders(tokenizer: Any) -> Iterator[Encoders]:
    made = Shared(
        tokenizer.backend_tokenizer.to_str(),
        eod_id=tokenizer.eos_token_id,
        dtype="<u4",
        procs=2,
        setting="procs",
    )
    yield made
    Encoders.close(made)


WEB = [texts(9, seed=0, mean=12), texts(1, seed=1, mean=90), texts(14, seed=2, mean=20)]
NEWS = [texts(7, seed=3, mean=8), texts(6, seed=4, mean=30)]


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("raw") / "web", WEB)


@pytest.fixture(scope="module")
def news(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("raw") / "news", NEWS, field="json.page.body")


def config_of(
    corpus: Path, sources: dict[str, tuple[Path, float]], *, global_batch: int = 24, **data: Any
) -> RunConfig:
    listed = [
        {"name": name, "shards": str(folder), "weight": weight}
        for name, (folder, weight) in sources.items()
    ]
    return RunConfig.model_validate(
        run_values(
            corpus,
            Path("none"),
            "x",
            train={"steps": 1000, "global_batch": global_batch, "micro_batch": 1},
            data={"seq_len": SEQ, "block": 8, "lanes": 12, "sources": listed, **data},
        )
    )


def open_stream(
    config: RunConfig,
    encoders: Encoders,
    *,
    place: Place = Place(),
    saved: CheckpointState | None = None,
) -> Stream:
    skip = config.data.on_error == "skip"
    rows, order = open_mixture(
        config,
        [
            TokenRows(open_manifest(s.shards, **config.data.remote), seq_len=SEQ, skip=skip)
            for s in config.data.sources
        ],
        saved=saved,
    )
    state, batch = (
        saved.position if saved else None,
        config.train.global_batch,
    )
    rows = TextRows(rows, order, encoders, global_batch=batch, place=place, state=state)
    return Stream(
        rows,
        order,
        global_batch=batch,
        micro_batch=1,
        place=place,
        state=state,
        with_documents=True,
    )


def train(
    config: RunConfig,
    encoders: Encoders,
    steps: int,
    *,
    world_size: int = 1,
    saved: CheckpointState | None = None,
) -> tuple[dict[int, tuple[Any, ...]], CheckpointState]:
    """Return what stood at each position (ids, documents, source, valid) over all ranks, and what a
    checkpoint says after ``steps``.
    """
    streams = [
        open_stream(config, encoders, place=Place(rank, world_size), saved=saved)
        for rank in range(world_size)
    ]
    seen: dict[int, tuple[Any, ...]] = {}
    for _ in range(steps):
        for stream in streams:
            for rows in stream.take():
                [position], [ids], [documents] = (
                    rows.position.tolist(),
                    rows.ids_BL.tolist(),
                    rows.document_ids_BL.tolist(),
                )
                assert position not in seen
                seen[position] = (ids, documents, int(rows.source_B), bool(rows.valid_B))
            stream.advance()
    states = [stream.state() for stream in streams]
    for stream in streams:
        stream.close()
    # between processes the sum is an all-reduce; the ranks of this test are in one
    state = replace(states[0], cursors=np.sum([state.cursors for state in states], axis=0).tolist())
    return seen, CheckpointState(
        step=(saved.step if saved else 0) + steps,
        stream=json.loads(json.dumps(state.to_dict())),
    )


class Oracle:
    """The same run, one row after the other: nothing is shared with ``text.py`` but the order of
    samples and the mixture.
    """

    def __init__(
        self,
        config: RunConfig,
        tokenizer: Any,
        shards: dict[int, list[list[str]]],
        *,
        damaged: set[str] = frozenset(),
    ) -> None:
        _, self.order = open_mixture(
            config, [TokenRows(s.shards, seq_len=SEQ) for s in config.data.sources]
        )
        self.lanes, self.tokenizer, self.shards, self.damaged = (
            config.data.lanes,
            tokenizer,
            shards,
            damaged,
        )
        self.ids: dict[tuple[int, int], list[int]] = {}
        self.owner: dict[
            tuple[int, int], list[tuple[int, str]]
        ] = {}  # of each id: which sample, counted in the lane
        self.read: dict[tuple[int, int], list[str]] = {}
        self.rows: dict[tuple[int, int], int] = {}

    def sample(self, source: int, lane: int, k: int) -> str:
        """Return the text of a lane's k-th sample."""
        count = sum(map(len, self.shards[source]))
        mine = [i for i in range(count) if i % self.lanes == lane]
        place = self.order.orders[source].locate(
            np.array([k // len(mine) * count + mine[k % len(mine)]])
        )
        return self.shards[source][int(place.shard[0])][int(place.row[0])]

    def row(self, position: int) -> tuple[list[int], list[int], bool]:
        """Return ids, documents and validity at a position of raw text. Each position once,
        rising.
        """
        source, lane = int(self.order.place(np.array([position]))[0][0]), position % self.lanes
        ids, owner, read = (
            part.setdefault((source, lane), []) for part in (self.ids, self.owner, self.read)
        )
        start = SEQ * self.rows.setdefault((source, lane), 0)
        self.rows[source, lane] += 1
        while len(ids) < start + SEQ + 1:
            text = self.sample(source, lane, len(read))
            new = (
                [0] * SEQ
                if text in self.damaged
                else [
                    *self.tokenizer(text, add_special_tokens=False)["input_ids"],
                    self.tokenizer.eos_token_id,
                ]
            )
            ids += new
            owner += [(len(read), text)] * len(new)
            read.append(text)
        inside = owner[start : start + SEQ + 1]
        if any(text in self.damaged for _, text in inside):
            return [0] * (SEQ + 1), [0] * (SEQ + 1), False
        return ids[start : start + SEQ + 1], [k - inside[0][0] for k, _ in inside], True


@pytest.fixture(autouse=True)
def _small_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that stays a few steps ahead: a test reads few."""
    monkeypatch.setattr(text.TextRows, "plan_tokens", 100 * SEQ)
    # or a lane of these few texts would ask for hundreds of epochs
    monkeypatch.setattr(text, "TASK_BYTES", (256, 2048))


@pytest.fixture(scope="module")
def expected(corpus: Path, tokenizer: Any, web: Path) -> list[tuple[Any, ...]]:
    oracle = Oracle(config_of(corpus, {"web": (web, 1)}), tokenizer, {0: WEB})
    rows = [oracle.row(position) for position in range(24 * 60)]
    assert min(len(read) // 2 for read in oracle.read.values()) >= 2, (
        "two ends of an epoch in every lane"
    )
    return [(ids, documents, 0, valid) for ids, documents, valid in rows]


def test_one_process_reads_what_the_oracle_reads(corpus, encoders, web, expected):
    seen, saved = train(config_of(corpus, {"web": (web, 1)}), encoders, 60)
    assert [seen[position] for position in range(24 * 60)] == expected
    assert saved.stream["consumed_rows"] == 24 * 60


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([1, 2, 3, 4, 6, 8]), st.sampled_from([24, 48, 72]), st.integers(0, 12)
        ),
        min_size=1,
        max_size=6,
    )
)
def test_any_chain_of_ranks_and_batches_gives_the_rows_of_one_process(
    corpus, encoders, web, expected, chain
):
    saved, seen = None, {}
    for world_size, global_batch, steps in chain:
        steps = min(steps, (24 * 60 - len(seen)) // global_batch)
        config = config_of(corpus, {"web": (web, 1)}, global_batch=global_batch)
        part, saved = train(config, encoders, steps, world_size=world_size, saved=saved)
        assert not seen.keys() & part.keys()
        seen |= part
    assert seen == dict(enumerate(expected[: len(seen)]))


def test_text_of_a_url_is_the_text_of_the_folder(corpus, encoders, web, tmp_path):
    with serve(web) as server:
        far, _ = train(
            config_of(corpus, {"web": (server.url, 1.0)}, cache={"folder": tmp_path}), encoders, 6
        )
        near, _ = train(config_of(corpus, {"web": (web, 1.0)}), encoders, 6)
    assert far == near


def test_tars_of_a_url_come_before_they_are_needed(corpus, encoders, expected, web, tmp_path):
    with serve(web) as server:
        stream, seen = (
            open_stream(
                config_of(corpus, {"web": (server.url, 1.0)}, cache={"folder": tmp_path}), encoders
            ),
            {},
        )
        stream.take()
        eventually(lambda: len(list(tmp_path.rglob("*.tar"))) == 3)
        server.gone = True
        for _ in range(20):
            seen |= {int(rows.position): rows.ids_BL[0].tolist() for rows in stream.take()}
            stream.advance()
        stream.close()
    assert [seen[position] for position in range(24 * 20)] == [
        ids for ids, *_ in expected[: 24 * 20]
    ]


def wait_for(_encode: Any, path: Path) -> None:
    """A task that keeps a tokenizing process from the next one until there is a file."""
    while not path.exists():
        time.sleep(0.01)


def test_a_tar_that_the_cache_removed_is_fetched_again(
    corpus, tokenizer, expected, web, tmp_path, monkeypatch
):
    monkeypatch.setattr(ahead, "ROUND_S", 100)  # the reader must help itself
    encoders = Encoders(
        tokenizer.backend_tokenizer.to_str(),
        eod_id=tokenizer.eos_token_id,
        dtype="<u4",
        procs=1,
        setting="procs",
    )
    encoders.submit(wait_for, tmp_path / "go")
    with serve(web) as server:
        stream = open_stream(
            config_of(corpus, {"web": (server.url, 1.0)}, cache={"folder": tmp_path / "cache"}),
            encoders,
        )
        eventually(
            lambda: (
                len(stream._rows._lanes) == 12
                and all(lane._asked for lane in stream._rows._lanes.values())
            )
        )
        for tar in (tmp_path / "cache").rglob("*.tar"):
            tar.unlink()
        (tmp_path / "go").touch()
        assert [rows.ids_BL[0].tolist() for rows in stream.take()] == [
            expected[int(rows.position)][0] for rows in stream.take()
        ]
        stream.close()
        assert max(server.asked[name] for name in server.asked if name.endswith(".tar")) == 2


def test_a_tar_that_cannot_be_had_is_skipped_as_a_missing_one(
    corpus, encoders, web, tmp_path, caplog
):
    near = Path(shutil.copytree(web, tmp_path / "near"))
    (near / "raw-001.tar").unlink()
    skip = {"on_error": "skip", "cache": {"folder": tmp_path / "cache", "retries": 0}}
    with serve(near) as server:
        far, _ = train(
            config_of(corpus, {"web": (server.url, 1.0)}, **skip), encoders, 30, world_size=2
        )
    assert caplog.text.count("rows are skipped") == 2, "once on each rank"
    assert far == train(config_of(corpus, {"web": (near, 1.0)}, **skip), encoders, 30)[0]
    assert caplog.text.count("rows are skipped") == 3
    (near / "raw-001.idx").unlink()  # without its index it is just as lost
    assert far == train(config_of(corpus, {"web": (near, 1.0)}, **skip), encoders, 30)[0]
    assert 0 < sum(not valid for *_, valid in far.values()) < 24 * 30


def test_any_chain_of_a_mixture_with_token_shards_too(
    corpus, encoders, tokenizer, web, news, make_corpus
):
    """Two sources of raw text and one of tokens, whose rows stay what they are without the text;
    the weights change on a resume.
    """
    coded = make_corpus(9_000, seed=5).folder
    mixed = {"code": (coded, 0.4), "web": (web, 0.35), "news": (news, 0.25)}
    config = config_of(corpus, mixed)
    oracle = Oracle(config, tokenizer, {1: WEB, 2: NEWS})
    source, cursor = oracle.order.place(np.arange(24 * 50))
    tokens = TokenRows(coded, seq_len=SEQ)
    places = oracle.order.orders[0].locate(cursor)
    ids, documents = np.empty((24 * 50, SEQ + 1), np.int64), np.empty((24 * 50, SEQ + 1), np.int32)
    prepared = tokens.prepare(places.shard, places.row, documents_per=1)
    prepared.fill(slice(0, 24 * 50), ids)
    for row, boundaries in zip(documents, prepared.boundaries, strict=True):
        row[:] = np.isin(np.arange(SEQ + 1), boundaries + 1).cumsum()
    expected = [
        (ids[p].tolist(), documents[p].tolist(), 0, True)
        if s == 0
        else (*oracle.row(p)[:2], s, True)
        for p, s in enumerate(source.tolist())
    ]
    saved, seen = None, {}
    for world_size, steps in [(2, 3), (8, 11), (3, 1), (6, 20), (1, 15)]:
        part, saved = train(config, encoders, steps, world_size=world_size, saved=saved)
        seen |= part
    assert [seen[position] for position in range(24 * 50)] == expected
    assert list(saved.stream["sources"]) == ["code", "web", "news"] and np.shape(
        saved.stream["cursors"]
    ) == (2, 12, 2)
    only_news = config_of(corpus, {"news": (news, 1), "web": (web, 0), "code": (coded, 0)})
    after, _ = train(only_news, encoders, 9, world_size=4, saved=saved)
    _, order = open_mixture(
        only_news, [TokenRows(s.shards, seq_len=SEQ) for s in only_news.data.sources], saved=saved
    )
    oracle.order = order
    for position, sort in zip(
        range(24 * 50, 24 * 59), order.place(np.arange(24 * 50, 24 * 59))[0].tolist(), strict=True
    ):
        if sort:
            assert after[position] == (*oracle.row(position)[:2], sort, True)


def test_a_source_of_text_joins_a_run_of_tokens(corpus, encoders, tokenizer, news, make_corpus):
    coded = make_corpus(9_000, seed=5).folder
    alone, both = (
        config_of(corpus, {"code": (coded, 1)}),
        config_of(corpus, {"code": (coded, 0.5), "news": (news, 0.5)}),
    )
    rows, order = open_mixture(alone, [TokenRows(coded, seq_len=SEQ)])
    stream = Stream(rows, order, global_batch=24, micro_batch=1, place=Place())
    for _ in range(3):
        stream.take()
        stream.advance()
    saved = CheckpointState(step=3, stream=stream.state().to_dict())
    stream.close()
    assert "cursors" not in saved.stream
    seen, saved = train(both, encoders, 20, world_size=3, saved=saved)
    oracle = Oracle(both, tokenizer, {1: NEWS})
    _, oracle.order = open_mixture(
        both, [TokenRows(folder, seq_len=SEQ) for folder in (coded, news)], saved=saved
    )
    joined = [position for position, row in sorted(seen.items()) if row[2] == 1]
    assert len(joined) > 100
    assert [seen[position][:2] for position in joined] == [
        oracle.row(position)[:2] for position in joined
    ]


def test_every_sample_once_an_epoch_and_epochs_are_counted(corpus, encoders, tokenizer, news):
    """What each lane has read, ids end to end, is each text of that epoch's lane once; ``epoch`` is
    the samples used up over all.
    """
    config = config_of(corpus, {"news": (news, 1)}, lanes=1, global_batch=6)
    stream = open_stream(config, encoders)
    ids: list[int] = []
    while stream.epochs()["epoch"] < 2:
        for rows in stream.take():
            ids += rows.ids_BL[0, :-1].tolist()
        stream.advance()
    used = stream.epochs()["epoch"] * 13
    stream.close()
    eod, cuts = tokenizer.eos_token_id, np.flatnonzero(np.array(ids) == tokenizer.eos_token_id)
    read = [
        tokenizer.decode(part[:-1] if part[-1:] == [eod] else part)
        for part in np.split(ids, cuts + 1)
    ]
    everything = sorted(text for shard in NEWS for text in shard)
    assert sorted(read[:13]) == sorted(read[13:26]) == everything
    assert read[:13] != read[13:26], "another order in the second epoch"
    assert used == pytest.approx(len(cuts), abs=1)


@pytest.mark.parametrize("world_size", [1, 4])
def test_a_damaged_sample_is_named_or_takes_one_rows_place(
    corpus, encoders, tokenizer, web, tmp_path, world_size
):
    for file in web.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "raw-002.tar"
    with tarfile.open(path) as tar:
        member = next(member for member in tar if member.name == "2/文-0003.txt")
    content = bytearray(path.read_bytes())
    content[member.offset_data] ^= 1
    path.write_bytes(content)
    (tmp_path / "raw-001.tar").unlink()
    config = config_of(corpus, {"web": (tmp_path, 1)})
    stream = open_stream(config, encoders)
    with pytest.raises(DataError, match=r"raw-00[12]\.tar") as caught:  # noqa: PT012 (which step comes to it depends on the order)
        for _ in range(60):
            stream.take()
            stream.advance()
    stream.close()
    assert any(
        said in str(caught.value)
        for said in ("does not match its checksum", "cannot be read: No such file")
    )
    if "checksum" in str(caught.value):
        assert f"member 2/文-0003.txt at offset {member.offset_data:,}" in str(caught.value)
    skip = config_of(corpus, {"web": (tmp_path, 1)}, on_error="skip")
    oracle = Oracle(skip, tokenizer, {0: WEB}, damaged={WEB[2][3], WEB[1][0]})
    seen, _ = train(skip, encoders, 50, world_size=world_size)
    for position in range(24 * 50):
        ids, documents, valid = oracle.row(position)
        assert seen[position] == (ids, documents, 0, valid)
    assert 0 < sum(not row[3] for row in seen.values()) < 24 * 25


def test_a_killed_process_is_a_clear_error(corpus, tokenizer, web):
    ours = Encoders(
        tokenizer.backend_tokenizer.to_str(),
        eod_id=0,
        dtype="<u4",
        procs=2,
        setting="data.tokenize_procs",
    )
    stream = open_stream(config_of(corpus, {"web": (web, 1)}), ours)
    stream.take()
    stream.advance()
    first, other = ours._pool._processes.values()
    # what asks the ranks to stop reaches them too
    for deaf in (
        signal.SIGTERM,
        signal.SIGUSR1,
        signal.SIGINT,
    ):
        os.kill(other.pid, deaf)
    os.kill(first.pid, signal.SIGKILL)
    with pytest.raises(  # noqa: PT012
        DataError, match=r"a tokenizing process was killed[\s\S]*data\.tokenize_procs lower"
    ):
        while True:
            stream.take()
            stream.advance()
    stream.close()
    eventually(lambda: not Path(f"/proc/{other.pid}").exists())  # the others end too


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 3])
def test_validation_rows_are_spread_samples_each_once(corpus, encoders, tokenizer, web, world_size):
    def rows(count: int) -> HeldOutText:
        return HeldOutText(TokenRows(web, seq_len=SEQ), encoders, count=count)

    everything = rows(200)
    ids = [
        token
        for shard in WEB
        for text in shard
        for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    ]
    assert int(everything.shard_rows[0]) == (len(ids) - 1) // SEQ
    seen = []
    for rank in range(world_size):
        for batch in EvaluationRows(
            rows(30), count=30, micro_batch=4, place=Place(rank, world_size), with_documents=True
        ):
            seen += [
                tuple(row)
                for row, valid in zip(batch.ids_BL.tolist(), batch.valid_B.tolist(), strict=True)
                if valid
            ]
            begins = (batch.ids_BL[:, :-1] == tokenizer.eos_token_id).cumsum(1)
            assert torch.equal(batch.document_ids_BL[:, 1:].long(), begins)
    kept = np.empty((30, SEQ + 1), np.int64)
    everything.prepare(np.zeros(30, int), np.arange(30)).fill(slice(0, 30), kept)
    assert sorted(seen) == sorted(map(tuple, kept.tolist()))
    with pytest.raises(DataError, match="not text enough"):
        HeldOutText(TokenRows(web, seq_len=10**6), encoders, count=3)


@pytest.mark.parametrize(
    ("train_section", "data", "says"),
    [
        (
            {"steps": None, "epochs": 1.0},
            {},
            r"not known before it is " r"tokenized[\s\S]*train.epochs[\s\S]*train.tokens",
        ),
        (
            {},
            {"lanes": 7},
            r"divide the global batch[\s\S]*7 lanes, global batch " r"24[\s\S]*data\.lanes=6 or 8",
        ),
        ({}, {"lanes": 24}, r"24 lanes[\s\S]*13 samples[\s\S]*data\.lanes=12"),
    ],
)
def test_what_raw_text_cannot_do_is_refused(corpus, news, train_section, data, says):
    config = config_of(corpus, {"news": (news, 1)}, **data)
    config = RunConfig.model_validate(
        {
            **config.model_dump(by_alias=True),
            "train": {**config.train.model_dump(), **train_section},
        }
    )
    with pytest.raises(ConfigError, match=says):
        open_mixture(config, [TokenRows(news, seq_len=SEQ)])


def test_lanes_are_chosen_once(corpus, encoders, news):
    def lanes(saved: Any = None, **options: Any) -> int:
        return open_mixture(
            config_of(corpus, {"news": (news, 1)}, **options),
            [TokenRows(news, seq_len=SEQ)],
            saved=saved,
        )[1].lanes

    assert [lanes(lanes="auto", global_batch=batch) for batch in (24, 26, 7, 34)] == [12, 13, 7, 2]
    _, saved = train(config_of(corpus, {"news": (news, 1)}, lanes="auto"), encoders, 2)
    assert lanes(saved, lanes="auto", global_batch=60) == 12
    with pytest.raises(
        ConfigError, match=r"divide the global batch[\s\S]*train\.global_batch=24 or 36"
    ):
        lanes(saved, lanes="auto", global_batch=32)
    capped = config_of(corpus, {"news": (news, 1)})
    capped = RunConfig.model_validate(
        {
            **capped.model_dump(by_alias=True),
            "data": {
                **capped.data.model_dump(),
                "sources": [{"name": "news", "shards": str(news), "max_epochs": 2}],
            },
        }
    )
    with pytest.raises(ConfigError, match="max_epochs of source news"):
        open_mixture(capped, [TokenRows(news, seq_len=SEQ)])


def test_other_text_on_a_resume_is_refused(corpus, encoders, web, news):
    _, saved = train(config_of(corpus, {"text": (web, 1)}), encoders, 2)
    with pytest.raises(DataError, match="source text of the checkpoint has other data"):
        open_stream(config_of(corpus, {"text": (news, 1)}), encoders, saved=saved)


def test_memory_is_bounded_whatever_the_epoch(corpus, encoders, web, monkeypatch):
    """After many epochs no lane holds more than its tasks and the sample under way, and nothing
    waits for ``advance``.
    """
    monkeypatch.setattr(text, "TASK_BYTES", (256, 512))
    stream = open_stream(config_of(corpus, {"web": (web, 1)}), encoders)
    for _ in range(300):
        stream.take()
        stream.advance()
    rows = stream._rows
    stream.close()
    assert max(len(lane._ids) for lane in rows._lanes.values()) < 2000
    assert len(rows._walked) <= 24 * 64 * 3
