"""The `hfscale` command. A verb's module is imported when the verb is used, so `--help` and typing errors are answered at once.

Each verb is `launch/commands/VERB.py` with a typer app named `app`: one command, or, with a callback, a group of them.
"""
from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from hfscale.errors import EXIT_UNHEALTHY, EXIT_USER_ERROR, UnhealthyError, UserError, nearest, user_error

VERBS = {  # a verb is listed when it works
    "tokenizer": "Train a tokenizer on your text.",
    "shards": "Build, index, verify and describe token shards.",
    "pretrain": "Train from a config, or go on with a run.",
    "show": "Print a config as it resolves, and where each value came from.",
    "batch": "Print the texts that a step of a run was trained on.",
    "checkpoints": "List a run's checkpoints; verify them.",
    "prove": "Kill and resume a short run of a config, and compare it with an undisturbed twin.",
    "export": "Turn a run into a transformers folder, proven to give equal logits.",
    "predict": "Generate text from a run or an export.",
}


class Verbs(TyperGroup):
    """A group of commands that knows their names and one-line helps without importing them."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, name: str) -> Any:
        if name not in VERBS:
            raise UserError(f"there is no verb {name!r}", where="command line", remedy=nearest(name, VERBS))
        command = typer.main.get_command(import_module(f"launch.commands.{name}").app)
        command.name = name
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


app = typer.Typer(cls=Verbs, rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False, no_args_is_help=True)


@app.callback(epilog="hfscale VERB --help explains a verb. Exit codes: 0 done, 2 a mistake to mend, 75 stopped and saved (run it again), "
                     "76 unhealthy numbers.")
def _hfscale() -> None:
    """Pretrain Hugging Face models on token shards with DeepSpeed ZeRO, and resume exactly."""


def main() -> None:
    """Run one command line and end the process; a user's mistake is one screen on stderr and exit code 2."""
    try:
        app(prog_name="hfscale")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except OSError as error:
        if (mistake := user_error(error)) is None:
            raise
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except UnhealthyError as error:
        print(f"unhealthy: {error}", file=sys.stderr)
        sys.exit(EXIT_UNHEALTHY)


if __name__ == "__main__":
    main()
