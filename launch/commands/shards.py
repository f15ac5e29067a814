"""``hfscale shards``: from text to token shards, and what is in them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from hfscale.errors import EXIT_STOPPED, ConfigError, DataError, shown
from launch.interrupt import Interrupted

app = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    add_completion=False,
    help="Build, index, verify and print shards.",
)
SHOWN = 20  # findings that are printed in full


@app.command(
    epilog="Example: hfscale shards build corpus.yaml source.path=books shards.path=data/books "
    "shards.procs=8"
)
def build(
    config: Annotated[
        Path, typer.Argument(help="YAML with sections source, split, tokenizer, shards")
    ],
    overrides: Annotated[Optional[list[str]], typer.Argument(metavar="[KEY=VALUE]...")] = None,
    part: Annotated[
        Optional[str],
        typer.Option(
            metavar="K/N",
            help="build part K (from 0) of N, beside PATH; whoever finishes the "
            "last part merges them (slurm/shards.sbatch)",
        ),
    ] = None,
) -> None:
    """Tokenize a corpus into PATH/train and PATH/validation. A killed build continues when it is
    run again.
    """
    from hfscale.config.corpus import CorpusConfig
    from hfscale.config.load import load_config

    loaded = load_config(config, overrides or [], schema=CorpusConfig).config
    number, _, count = (part or "0/1").partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise ConfigError(
            "this is no part of a build",
            where="--part",
            value=part,
            remedy="say --part 0/8, 1/8, ..., 7/8",
        )
    from hfscale.corpus.build import build_part, build_shards
    from hfscale.shards.counts import seen_line

    try:
        built, missing = (
            build_part(loaded, number=int(number), count=int(count))
            if part
            else (build_shards(loaded), [])
        )
    except Interrupted:
        typer.echo(f"stopped: {loaded.shards.path}; the same command continues", err=True)
        raise typer.Exit(EXIT_STOPPED) from None
    if not built:
        print(
            f"part {part} is built; "
            + (
                f"missing: {', '.join(map(str, missing))}. Whoever finishes the last one merges all"
                if missing
                else "all are, and another process merges them"
            )
        )
        return
    for side, manifest in built.items():
        print(
            f"{side:<10} {manifest.tokens:>15,} tokens {manifest.documents:>11,} documents "
            f"{len(manifest.shards):>5,} shards  "
            f"{manifest.folder}"
        )
    if seen := built["train"].seen:
        print(seen_line(seen))


@app.command(epilog="Example: hfscale shards index data/raw-*.tar --field txt")
def index(
    tars: Annotated[list[Path], typer.Argument(help="uncompressed WebDataset tars with text")],
    out: Annotated[
        Optional[Path], typer.Option(help="folder for index and manifest; default: beside the tars")
    ] = None,
    field: Annotated[
        Optional[str], typer.Option(help="what holds the text: txt, json.text")
    ] = None,
) -> None:
    """Make index and manifest for raw-text tars of others. The tars are only read."""
    from hfscale.dist.world import available_cores
    from hfscale.log import progress_bar
    from hfscale.shards.raw import index_tars

    folders = {tar.parent for tar in tars}
    if missing := [tar for tar in tars if not tar.is_file()]:
        raise DataError(
            "there is no such tar", where=missing[0], remedy="give files such as data/*.tar"
        )
    if out is None and len(folders) > 1:
        raise DataError(
            "the tars lie in several folders",
            value=sorted(map(str, folders))[:4],
            remedy="say where the manifest goes: --out FOLDER",
        )
    with progress_bar("indexing", len(tars), unit="tar") as bar:
        manifest = index_tars(
            tars,
            folder=out or folders.pop(),
            field=field,
            threads=available_cores(),
            checked=lambda _: bar.update(),
        )
    print(
        f"{manifest.documents:,} samples in {len(manifest.shards):,} tars  "
        f"{manifest.folder / 'manifest.json'}"
    )


@app.command(epilog="Example: hfscale shards verify data/books")
def verify(
    path: Annotated[
        str,
        typer.Argument(
            help="folder of a build, of one side of it, a manifest.json, or a URL of one"
        ),
    ],
) -> None:
    """Check every byte and count; all damage in one report."""
    from hfscale.dist.world import available_cores
    from hfscale.log import progress_bar
    from hfscale.shards.verify import manifests_at
    from hfscale.shards.verify import verify as verify_manifest

    findings: list[str] = []
    for manifest in manifests_at(path):
        with progress_bar(f"verifying {manifest.folder.name}", manifest.bytes) as bar:
            found = verify_manifest(manifest, threads=available_cores(), advance=bar.update)
        findings += found
        print(
            f"{'damaged' if found else 'good':<8} {len(manifest.shards):,} shards, "
            f"{manifest.tokens:,} tokens, "
            f"{manifest.documents:,} documents  {manifest.folder}"
        )
    if findings:
        more = [f"... and {len(findings) - SHOWN:,} more"] if len(findings) > SHOWN else []
        raise DataError(
            "damage was found:\n  " + "\n  ".join([*findings[:SHOWN], *more]),
            where=path,
            remedy="restore these shards from a copy, or build them again in another folder",
        )


@app.command(epilog="Example: hfscale shards stats data/books --png lengths.png")
def stats(
    path: Annotated[
        str,
        typer.Argument(
            help="folder of a build, of one side of it, a manifest.json, or a URL of one"
        ),
    ],
    png: Annotated[
        Optional[Path], typer.Option(help="draw the lengths of documents into this file too")
    ] = None,
) -> None:
    """Print tokens, documents, bytes and the lengths of documents."""
    from hfscale.shards.stats import describe, draw, unigram_entropy
    from hfscale.shards.verify import manifests_at

    found = {manifest.folder.name: manifest for manifest in manifests_at(path)}
    for manifest in found.values():
        print(describe(manifest))
    if {"train", "validation"} <= found.keys():
        entropy = unigram_entropy(found["train"], found["validation"])
        print(
            f"unigram entropy of validation under train: {entropy:.3f} nats a token (a model "
            "that learnt frequencies only)"
        )
    if png is not None:
        draw(found, png)
        print(f"drawn  {png}")


@app.command(epilog="Example: hfscale shards cat data/books/train --document 1000 --count 3")
def cat(
    path: Annotated[
        str, typer.Argument(help="folder with a manifest.json, that file, or a URL of either")
    ],
    document: Annotated[
        Optional[int],
        typer.Option(help="from this document (or sample of raw text) on; default: 0"),
    ] = None,
    row: Annotated[
        Optional[int],
        typer.Option(help="from this row of --seq-len tokens on, in the order of the shards"),
    ] = None,
    seq_len: Annotated[
        Optional[int], typer.Option(min=1, help="tokens of a row, as data.seq_len")
    ] = None,
    key: Annotated[
        Optional[str], typer.Option(help="the sample with this key, of tars of raw text")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="how many")] = 1,
    tokenizer: Annotated[
        Optional[str], typer.Option(help="folder or hub name; default: the one beside the shards")
    ] = None,
) -> None:
    """Print documents, rows or samples as text."""
    if sum(option is not None for option in (document, row, key)) > 1 or (row is None) != (
        seq_len is None
    ):
        raise ConfigError("give one of --document N, --key K, or --row N with --seq-len L")
    from hfscale.reports.cat import documents, find_tokenizer, rows, samples
    from hfscale.shards.manifest import TEXT
    from hfscale.shards.open import open_manifest

    manifest = open_manifest(path)
    if manifest.dtype == TEXT:
        if row is not None:
            raise DataError(
                "tars of raw text have samples, not rows",
                where=path,
                remedy="give --document N or --key K",
            )
        found = samples(manifest, first=document or 0, count=count, key=key)
    elif key is not None:
        raise DataError(
            "token shards have documents, not keys",
            where=path,
            remedy="give --document N, or --row N with --seq-len L",
        )
    else:
        decode = find_tokenizer(manifest, tokenizer).decode
        pieces = (
            rows(manifest, first=row, count=count, seq_len=seq_len)
            if row is not None and seq_len is not None
            else documents(manifest, first=document or 0, count=count)
        )
        found = ((title, str(decode(ids))) for title, ids in pieces)
    for title, text in found:
        print(f"--- {shown(title)}", text, sep="\n")
