"""``hfscale tokenizer``: train a tokenizer on the text that shards will be built from."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="Train a tokenizer on your text.")


@app.callback()
def _group() -> None:
    """Keeps ``train`` a sub-command while it is the only one."""


@app.command(epilog="Example: hfscale tokenizer train corpus.yaml source.path=books tokenizer.path=data/tokenizer tokenizer.kind=unigram")
def train(config: Annotated[Path, typer.Argument(help="YAML with sections source, split, tokenizer, shards")],
          overrides: Annotated[Optional[list[str]], typer.Argument(metavar="[KEY=VALUE]...")] = None) -> None:  # noqa: UP045 (typer, 3.10)
    """Train on the train side of the corpus, save for AutoTokenizer, and measure on the held-out side."""
    from hfscale.config.load import load_config
    from hfscale.config.schema import CorpusConfig

    loaded = load_config(config, overrides or [], schema=CorpusConfig).config
    from hfscale.corpus.tokenizer_training import train_tokenizer

    report = train_tokenizer(loaded)
    state = "was trained already, nothing to do" if report.get("already_trained") else "trained"
    print(f"tokenizer {state}: {loaded.tokenizer.path}")
    asked = loaded.tokenizer.vocab_size
    such_as = f", such as {', '.join(report['skipped'])}" if report["skipped"] else ""
    fewer = f" ({asked:,} were asked: the text gives no more)" if report["vocab_size"] < asked else ""
    print(f"  {loaded.tokenizer.kind}, {report['vocab_size']:,} tokens{fewer}, "
          f"from {report['trained_on']:,} of {report['documents']:,} documents "
          f"({report['duplicates']:,} duplicates; {report['undecodable']:,} skipped as not UTF-8{such_as})")
    print(f"  on {report['measured_on']}: {report['bytes_per_token']:.2f} bytes a token, "
          f"{report['vocabulary_used']:.1%} of the vocabulary used, {report['unknown']:.2%} unknown tokens")
