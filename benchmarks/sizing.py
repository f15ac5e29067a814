"""The tables of docs/sizing.md, made by `hfscale plan`'s own arithmetic: how large a model fits on
which GPUs, how it is trained, and how long that takes.

    python -m benchmarks.sizing          # writes them into the page (a minute)

tests/planning/test_sizing.py makes them again and compares.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfscale.config.schema import RunConfig
from hfscale.models.devices import device_named
from hfscale.monitor.clock import duration
from hfscale.planning.advice import Choice, best_by_stage, recommended
from hfscale.planning.figures import GIB, count, size
from hfscale.planning.plan import CHINCHILLA
from hfscale.planning.site import Site
from hfscale.planning.subject import Subject

PAGE = Path(__file__).resolve().parents[1] / "docs" / "sizing.md"
SEQ_LEN, GLOBAL_BATCH = 4096, 256  # a million tokens a step
RANKS = (1, 8, 64)
CONSUMER_NETWORK = 100e9 / 8 / 8  # bytes a second: 100 Gb/s a node, shared by its eight GPUs
GPUS = ("rtx4090", "a100-40", "h100", "h200")


@dataclass(frozen=True)
class Shape:
    """A Llama of a published shape."""

    name: str
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int = 128_256


# GPT-3's small sizes with Llama's blocks, then Llama 2 and 3 (Meta 2023, 2024)
SHAPES = (
    Shape("0.16B", 768, 12, 12, 12, 2048, 50_304),
    Shape("0.4B", 1024, 24, 16, 16, 2816, 50_304),
    Shape("1.2B", 2048, 16, 32, 8, 8192),
    Shape("3.2B", 3072, 28, 24, 8, 8192),
    Shape("8B", 4096, 32, 32, 8, 14336),
    Shape("13B", 5120, 40, 40, 40, 13824, 32_000),
    Shape("34B", 8192, 48, 64, 8, 22016, 32_000),
    Shape("70B", 8192, 80, 64, 8, 28672),
    Shape("405B", 16384, 126, 128, 8, 53248),
)


def config_of(shape: Shape) -> RunConfig:
    """Return the config of a run of that shape; its data are nowhere."""
    values: dict[str, Any] = {
        "run": {"name": shape.name},
        "tokenizer": {"path": "./no-tokenizer"},
        "data": {"seq_len": SEQ_LEN, "sources": [{"shards": "./no-shards"}]},
        "objective": {"name": "clm"},
        "model": {
            "architecture": "llama",
            "config": {
                "vocab_size": shape.vocabulary,
                "hidden_size": shape.hidden_size,
                "num_hidden_layers": shape.layers,
                "num_attention_heads": shape.heads,
                "num_key_value_heads": shape.kv_heads,
                "intermediate_size": shape.ffn,
                "max_position_embeddings": SEQ_LEN,
                "tie_word_embeddings": shape.layers < 32,
            },
        },
        "train": {"steps": 1, "global_batch": GLOBAL_BATCH, "micro_batch": 1},
        "engine": {"compile": True},
    }
    return RunConfig.model_validate(values)


def site_of(gpu: str, ranks: int) -> Site:
    """Return ``ranks`` GPUs, eight on a node."""
    device = device_named(gpu)
    network = device.network or CONSUMER_NETWORK
    return Site(device, ranks, min(ranks, 8), network, device.memory_gib * GIB)


class Sizes:
    """The models, each traced once."""

    def __init__(self) -> None:
        self._subjects: dict[str, Subject] = {}

    def subject(self, shape: Shape) -> Subject:
        """Return the subject of ``shape``."""
        if shape.name not in self._subjects:
            self._subjects[shape.name] = Subject(config_of(shape), on_cpu=False)
        return self._subjects[shape.name]

    def largest(self, site: Site) -> tuple[Shape, Choice] | None:
        """Return the largest model that fits without offloading, and how it is trained best."""
        for shape in reversed(SHAPES):
            found = best_by_stage(self.subject(shape), site)
            if best := recommended([one for one in found if one.setup.offload == "none"]):
                return shape, best
        return None


def rows(sizes: Sizes) -> Iterator[str]:
    """Yield the lines of a table."""
    yield (
        "| GPU | GPUs | largest model | ZeRO stage | checkpointing | micro-batch | peak a GPU | "
        "tokens/s | MFU | Chinchilla-optimal in |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for gpu in GPUS:
        for ranks in RANKS:
            site = site_of(gpu, ranks)
            fitting = sizes.largest(site)
            if fitting:
                yield _row(sizes, site, *fitting)


def _row(sizes: Sizes, site: Site, shape: Shape, best: Choice) -> str:
    weights = sizes.subject(shape).weights.trained
    setup, fast = best.setup, best.speed
    seconds = CHINCHILLA * weights / fast.tokens_per_s.value
    cells = (
        f"{site.device.name} ({site.memory_bytes / GIB:.0f} GiB)",
        site.ranks,
        shape.name,
        setup.stage,
        "yes" if setup.checkpointing else "no",
        setup.micro_batch,
        size(best.memory.peak.value),
        count(float(f"{fast.tokens_per_s.value:.2g}")),
        f"{fast.mfu.value:.0%}",
        rough(seconds),
    )
    return f"| {' | '.join(map(str, cells))} |"


def rough(seconds: float) -> str:
    """Return a length of time as exact as a plan is."""
    for name, unit in (("years", 365 * 86400), ("days", 86400), ("hours", 3600)):
        if seconds >= 2 * unit:
            return f"{count(float(f'{seconds / unit:.2g}'))} {name}"
    return duration(seconds)


def tables() -> dict[str, str]:
    """Return the tables of the page by the names of their marks."""
    return {"largest models": "\n".join(rows(Sizes()))}


def with_tables(text: str, made: dict[str, str]) -> str:
    """Return the page ``text`` with ``made`` between its marks."""
    for name, table in made.items():
        begin, end = f"<!-- made by benchmarks.sizing: {name} -->\n", "<!-- end -->"
        before, _, after = text.partition(begin)
        text = f"{before}{begin}{table}\n{end}{after.partition(end)[2]}"
    return text


def main() -> None:
    """Write the tables into the page."""
    PAGE.write_text(with_tables(PAGE.read_text("utf-8"), tables()), "utf-8")


if __name__ == "__main__":
    main()
