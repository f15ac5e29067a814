"""The `hfscale` command. A verb's module is imported when the verb is used, so `--help` and typing
errors are answered at once.

A verb is a function of its name in `launch/commands/VERB.py`, or in `runs.py` beside it; a group of
commands is a typer app named `app`.
"""

from __future__ import annotations

import io
import sys
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hfscale import log
from hfscale.errors import EXIT_INTERRUPTED, UserError, exit_code, nearest
from launch.interrupt import Interrupted, listen

VERBS = {  # a verb is listed when it works
    "tokenizer": "Train a tokenizer on your text.",
    "shards": "Build, index, verify and describe token shards.",
    "pretrain": "Train from a config, or go on with a run.",
    "finetune": "Fine-tune a model for a task on labelled examples.",
    "tune": "Find the micro-batch, speed options and learning rate of a config, by trials here.",
    "status": "Where a run is: queue, step, speed, expected end, last checkpoint.",
    "goodput": "Where the time of a run went: queue, start-up, compute, stalls, lost work.",
    "profile": "A profile of the next steps of a run that is under way.",
    "report": "A page about a run that one can mail: curves, time, data, scores, hardware.",
    "diff": "In what two runs differ, and from which step on their losses part.",
    "logs": "Print a run's log, and follow it.",
    "doctor": "Check and measure this machine, or the nodes of an allocation, for a run.",
    "plan": "What a config will take: memory, speed, cost; which stage and micro-batch fit.",
    "configs": "List the configs that come with hfscale, or copy them to edit.",
    "show": "Print a config as it resolves, and where each value came from.",
    "batch": "Print the texts that a step of a run was trained on.",
    "incident": "What was wrong with a run, and which texts of a step are to blame.",
    "checkpoints": "List a run's checkpoints and why each is kept; verify, pin, prune.",
    "rehearse": "Go through the life of a run in small: signals, kills, a hang, resumes, export.",
    "prove": "Try what a run promises on your config: a resume after kills, the engine's gradient.",
    "export": "Turn a run into a transformers folder, proven to give equal logits.",
    "evaluate": "Scores of a model: a task's metrics with intervals, or perplexity on shards.",
    "compare": "A table of the scores of runs.",
    "predict": "Predictions of a model for texts or a table: labels, answers, continuations.",
}


class Verbs(TyperGroup):
    """A group of commands that knows their names and one-line helps without importing them."""

    def list_commands(self, ctx: object) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: object, name: str) -> Any:
        if name not in VERBS:
            raise UserError(
                f"there is no verb {name!r}", where="command line", remedy=nearest(name, VERBS)
            )
        own = f"launch.commands.{name}"
        module = import_module(own if find_spec(own) else "launch.commands.runs")
        app = getattr(module, "app", None) or typer.Typer(
            rich_markup_mode=None, add_completion=False
        )
        if not hasattr(module, "app"):
            app.command()(getattr(module, name))
        command = typer.main.get_command(app)
        command.name = name
        return command

    def format_commands(self, ctx: object, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


app = typer.Typer(
    cls=Verbs,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        typer.echo(f"hfscale {metadata.version('hfscale')}")
    except metadata.PackageNotFoundError:
        typer.echo("hfscale, not installed: run from its checkout")
    raise typer.Exit


@app.callback(
    epilog="hfscale VERB --help explains a verb. Exit codes: 0 done, 2 a mistake to mend, 75 "
    "stopped and saved (run it again), "
    "76 unhealthy numbers, 77 hung (run it again), 130 interrupted by Ctrl-C (nothing was kept). "
    "Ctrl-C stops training, shards build and predict --out in order (75); once more kills."
)
def _hfscale(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Pretrain, fine-tune, evaluate and use Hugging Face models with DeepSpeed ZeRO, and resume
    exactly.
    """
    log.setup()


def main() -> None:
    """Run one command line and end the process; a user's mistake is one screen on stderr and exit
    code 2.
    """
    listen()
    for stream in (sys.stdout, sys.stderr):  # names of files need not be text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="hfscale")
    except Interrupted:
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        if (code := exit_code(error)) is None:
            raise
        sys.exit(code)


if __name__ == "__main__":
    main()
