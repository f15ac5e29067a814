"""``hfscale tokenizer``: train a tokenizer on the text that shards will be built from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

app = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    add_completion=False,
    help="Train a tokenizer on your text, or extend one.",
)


@app.command(
    epilog="Example: hfscale tokenizer train corpus.yaml source.path=books "
    "tokenizer.path=data/tokenizer tokenizer.kind=unigram"
)
def train(
    config: Annotated[
        Path, typer.Argument(help="YAML with sections source, split, tokenizer, shards")
    ],
    overrides: Annotated[Optional[list[str]], typer.Argument(metavar="[KEY=VALUE]...")] = None,
) -> None:
    """Train a transformers tokenizer; measure it on held-out text."""
    from hfscale.config.corpus import CorpusConfig
    from hfscale.config.load import load_config

    loaded = load_config(config, overrides or [], schema=CorpusConfig).config
    from hfscale.corpus.tokenizer_training import train_tokenizer
    from hfscale.shards.counts import seen_line

    report = train_tokenizer(loaded)
    state = "was trained already, nothing to do" if report.already_trained else "trained"
    print(f"tokenizer {state}: {loaded.tokenizer.path}")
    asked = loaded.tokenizer.vocab_size
    fewer = f" ({asked:,} were asked: the text gives no more)" if report.vocab_size < asked else ""
    print(
        f"  {loaded.tokenizer.kind}, {report.vocab_size:,} tokens{fewer}, "
        f"from {report.trained_on:,} of {report.documents:,} documents"
    )
    if report.seen:  # there is none in those from before
        print(f"  {seen_line(report.seen)}")
    print(
        f"  on {report.measured_on}: {report.bytes_per_token:.2f} bytes a token, "
        f"{report.vocabulary_used:.1%} of the vocabulary used, {report.unknown:.2%} "
        "unknown tokens"
    )


@app.command(
    epilog="Example: hfscale tokenizer add data/tokenizer data/tokenizer-mlm mask='<mask>' "
    "cls='<s>' pad='<pad>' sentinels=100"
)
def add(
    path: Annotated[str, typer.Argument(help="tokenizer folder or hub name")],
    out: Annotated[
        Path, typer.Argument(help="folder for the tokenizer with more tokens; it must not exist")
    ],
    tokens: Annotated[
        list[str],
        typer.Argument(
            metavar="ROLE=TOKEN...", help="mask, cls, sep, pad, bos, eos, unk; sentinels=N"
        ),
    ],
) -> None:
    """Add special tokens that an objective needs. The ids of text stay the same, so shards that
    were built stay good.
    """
    from hfscale.errors import ConfigError, nearest
    from hfscale.shards.files import whole_folder
    from hfscale.tokenizer import extended, save_files

    roles = dict(token.partition("=")[::2] for token in tokens)
    for role, token in roles.items():
        known = ("mask", "cls", "sep", "pad", "bos", "eos", "unk", "sentinels")
        if role not in known or not token or (role == "sentinels" and not token.isdigit()):
            raise ConfigError(
                "a token is written ROLE=TOKEN, sentinels as sentinels=100",
                where="command line",
                value=f"{role}={token}",
                remedy=nearest(role, known),
            )
    if out.exists():
        raise ConfigError(
            "this folder exists already; nothing was written",
            where=out,
            remedy="name another folder, or remove it",
        )
    count = int(roles.pop("sentinels", 0))
    tokenizer = extended(
        path, roles={f"{role}_token": token for role, token in roles.items()}, sentinels=count
    )
    with whole_folder(out) as partial:
        save_files(tokenizer, partial)
    print(f"{len(tokenizer):,} ids  {out}")
