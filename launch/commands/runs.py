"""Verbs about a run and its model. What each needs is imported when it is used, so that `--help`
stays fast.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from hfscale.errors import CheckpointError, ConfigError, shown
from hfscale.log import logger
from hfscale.run_files import JOB, LOGS, RANK_LOG, SLURM_LOG

Source = Annotated[
    str,
    typer.Argument(metavar="CONFIG_OR_RUN", help="A YAML file, or a run directory to go on with."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="key=value...",
        help="Dotted overrides: train.steps=100 optim.lr=3e-4",
        show_default=False,
    ),
]
Launcher = Annotated[
    str,
    typer.Option(help="local: processes here; slurm, submitit: a job; debug: one process, tiny."),
]
Procs = Annotated[
    int | None, typer.Option(min=1, help="Ranks. Without it: one a GPU, or 2 on the CPU.")
]
Port = Annotated[
    int | None, typer.Option(min=1, max=65535, help="Where the ranks meet. Without it: a free one.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything, print what would run, write nothing.")
]
Permissions = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="data.allow_pipe=true model.trust_remote_code=true",
        help="Let commands, or code of the model, run that the run's config names.",
        show_default=False,
    ),
]


def permit(permissions: list[str] | None) -> None:
    """Let run what the command line says may run; nothing else is asked of this verb.

    Raises:
        ConfigError: if something is.
    """
    from hfscale.config.permission import KEYS, grant

    if other := grant(permissions or ()):
        raise ConfigError(
            "only permissions can be given here",
            where="command line",
            value=other[0],
            remedy=" or ".join(f"{key}=true" for key in KEYS),
        )


def pretrain(
    config_or_run: Source,
    overrides: Overrides = None,
    launcher: Launcher = "local",
    procs: Procs = None,
    port: Port = None,
    dry_run: DryRun = False,
) -> None:
    """Train from CONFIG in its run directory, run.root/run.name. The same command again goes on
    where it stopped.

    Examples:
    hfscale pretrain configs/pretrain/gpt2_small.yaml run.name=first --procs 8;
    hfscale pretrain runs/first train.steps=200000
    """
    _train("pretrain", config_or_run, overrides, launcher, procs, port, dry_run)


def finetune(
    config_or_run: Source,
    overrides: Overrides = None,
    launcher: Launcher = "local",
    procs: Procs = None,
    port: Port = None,
    dry_run: DryRun = False,
) -> None:
    """Fine-tune a model for the task of CONFIG on labelled examples. The same command again goes on
    where it stopped.

    Examples: hfscale finetune configs/finetune/sentiment.yaml data.train=reviews.csv
    data.columns.text=review data.columns.label=stars; hfscale finetune runs/sentiment
    train.epochs=5
    """
    _train("finetune", config_or_run, overrides, launcher, procs, port, dry_run)


def _train(
    verb: str,
    source: str,
    overrides: list[str] | None,
    launcher: str,
    procs: int | None,
    port: int | None,
    dry_run: bool,
) -> None:
    """Start what ``source`` says; the exit code is the launcher's.

    Raises:
        ConfigError: also if it is for another verb.
    """
    from hfscale.config.permission import grant
    from hfscale.registry import load_plugin
    from launch.job import Training
    from launch.rehearsal import kept
    from launch.request import LAUNCHERS, Request, quote, refuse_copies

    refuse_copies()
    grant(overrides or ())  # to the ranks, and to the job that Slurm starts
    request = Request(source, tuple(overrides or ()), procs=procs, port=port, dry_run=dry_run)
    launch = load_plugin("launcher", LAUNCHERS, launcher)
    job = Training(request)
    if job.config.verb != verb:
        section = "a task" if job.config.verb == "finetune" else "an objective"
        raise ConfigError(
            f"this config has {section}: it is for hfscale {job.config.verb}",
            where=source,
            value=f"hfscale {verb}",
            remedy=f"hfscale {job.config.verb} {quote(source)}",
        )
    if launcher in ("slurm", "submitit"):
        for line in kept.said(job):
            logger.info(f"notice: {line}")
    raise typer.Exit(launch(job))


def compare(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="RUN_OR_SCORES...", help="Run directories, or scores.json files."),
    ],
    csv: Annotated[
        Path | None, typer.Option(help="Write the table here, with confidence intervals.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option(help="Draw it here, with confidence intervals.")
    ] = None,
) -> None:
    """Print a table of what each run scored: its evaluations, its best and its newest validation;
    and means over runs of several seeds.

    Example: hfscale compare runs/sentiment-* --csv scores.csv --png scores.png
    """
    from hfscale.reports import compare as report

    found = report.find(sources)
    typer.echo(report.table(found))
    for write, path in ((report.write_csv, csv), (report.draw, png)):
        if path is not None:
            write(found, path)


def goodput(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print it for scripts.")] = False,
) -> None:
    """Print where the time of RUN went since its first submission, over all attempts: queue,
    start-up, compute, stalls, lost work, hangs.

    Example: hfscale goodput runs/first
    """
    from hfscale.reports.goodput import ledger
    from hfscale.reports.hours import describe
    from launch.request import training_run

    times = ledger(training_run(run))
    typer.echo(json.dumps(times.as_dict()) if as_json else "\n".join(describe(times)))


def logs(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory.")],
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on printing what is added, until Ctrl-C.")
    ] = False,
    lines: Annotated[
        int, typer.Option("--lines", "-n", min=1, help="How many of the last lines.")
    ] = 50,
) -> None:
    """Print the last lines of rank 0 and of the newest Slurm job; the other ranks' logs lie beside
    them.

    Example: hfscale logs runs/first -f
    """
    from launch.request import config_file, quote

    home = config_file(run).resolve().parent
    folder, held = home / LOGS, home / JOB
    jobs = sorted(folder.glob(SLURM_LOG.format("*")), key=lambda file: file.stat().st_mtime)[-1:]
    files = [*jobs, *folder.glob(RANK_LOG.format(0))]
    if held.is_file() and (job := held.read_text().strip()):  # of submitit: rank 0's two
        files += sorted((home.parent / "submitit").glob(f"*/{job}_0_log.*"))
    if not files:
        raise CheckpointError(
            "this run has no log yet",
            where=folder,
            remedy=f"see where it is: hfscale status {quote(run)}",
        )
    os.execvp("tail", ["tail", "-n", str(lines), *(["-F"] if follow else []), *map(str, files)])


def show(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG", help="A YAML file, or a run directory.", show_default=False
        ),
    ] = None,
    overrides: Overrides = None,
    procs: Annotated[
        int | None, typer.Option(help="Show the batch as cut for this many ranks.", min=1)
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema instead, for editors.")
    ] = False,
) -> None:
    """Print every value of CONFIG, where it came from (default, file:line, command line), and the
    numbers that follow.

    Examples: hfscale show configs/pretrain/gpt2_small.yaml train.steps=100; hfscale show --schema >
    schema.json
    """
    from hfscale.reports.show import show_config, show_schema
    from launch.request import config_file

    if config is None and not schema:
        raise typer.BadParameter("give a CONFIG, or --schema")
    file = config_file(config) if config else None
    typer.echo(
        show_schema(file)
        if schema or file is None
        else show_config(file, overrides or [], procs=procs)
    )


def batch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    step: Annotated[int, typer.Option(help="Which optimizer step, counted from 1.")],
    permissions: Permissions = None,
    full: Annotated[
        bool, typer.Option("--full", help="Print each text whole, not its first 200 characters.")
    ] = False,
) -> None:
    """Print what a step was trained on, rebuilt from the shards alone. The exit code is 1 if its
    digest is not the logged one.

    Example: hfscale batch runs/quickstart --step 100
    """
    from hfscale.run_files import is_run, no_run

    if not is_run(run):
        raise no_run(run)
    from hfscale.reports.batch import rebuild

    permit(permissions)
    rebuilt = rebuild(run, step=step)
    for row in rebuilt.rows:
        documents = "-".join(map(str, dict.fromkeys(row.documents)))
        typer.echo(
            shown(
                f"row {row.position:,}  {row.source}  {row.shard}  tokens from {row.start:,}  "
                f"{row.member}  documents {documents}"
            )
        )
        typer.echo("    " + (row.text if full else row.text[:200]).replace("\n", "\n    "))
    verdict = (
        "not logged"
        if rebuilt.logged is None
        else "equals the logged one"
        if rebuilt.logged == rebuilt.digest
        else (
            f"is NOT the logged one ({rebuilt.logged}): other shards, or another config than "
            "this step was trained with"
        )
    )
    older = " (version 1: of the inputs, without the last label of a row)"
    typer.echo(
        f"{len(rebuilt.rows):,} rows, batch_digest {rebuilt.digest}: {verdict}"
        + older * (rebuilt.version == 1)
    )
    raise typer.Exit(1 if rebuilt.logged not in (None, rebuilt.digest) else 0)


def checkpoints(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run directory; its job may be running.")
    ],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every byte and compare it with the manifest.")
    ] = False,
    pin: Annotated[
        list[int] | None,
        typer.Option(metavar="STEP", help="Keep this checkpoint, whatever the config says."),
    ] = None,
    unpin: Annotated[list[int] | None, typer.Option(metavar="STEP", help="No longer.")] = None,
    prune: Annotated[
        bool,
        typer.Option(
            "--prune", help="Remove now what nothing keeps; the newest good one always stays."
        ),
    ] = False,
) -> None:
    """List the checkpoints of RUN, oldest first, and why each is kept. With --verify the exit code
    is 1 if one is damaged.

    Examples: hfscale checkpoints runs/quickstart --verify; hfscale checkpoints runs/quickstart
    --pin 1000 --prune
    """
    from hfscale.checkpoint import layout
    from hfscale.reports.checkpoints import list_checkpoints, open_folder, rejected
    from hfscale.reports.checkpoints import prune as prune_run

    folder, _ = open_folder(run)
    for step, pinned in [
        *((step, True) for step in pin or ()),
        *((step, False) for step in unpin or ()),
    ]:
        layout.pin(folder, step, pinned=pinned)
    if prune:
        gone, free = prune_run(run)
        typer.echo(
            f"removed {', '.join(path.name for path in gone) or 'nothing'}; {free / 1e9:,.1f} "
            "GB free"
        )
    found = list(list_checkpoints(run, verify=verify))
    for line, problems in found:
        typer.echo(
            "\n    ".join(
                [
                    line + ("" if problems is None else "  damaged" if problems else "  ok"),
                    *(problems or ()),
                ]
            )
        )
    if not found:
        typer.echo(f"no checkpoints in {run} yet")
    for path in rejected(run):
        typer.echo(f"rejected earlier, kept for inspection: {path}")
    raise typer.Exit(1 if any(problems for _, problems in found) else 0)


def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A run directory (its newest checkpoint) or one of its checkpoints.",
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The folder to make; it must not exist.")
    ],
    permissions: Permissions = None,
    adapter: Annotated[
        bool,
        typer.Option(
            "--adapter", help="The LoRA adapters of MODEL alone, for peft; else they are merged."
        ),
    ] = False,
) -> None:
    """Write OUT as a transformers folder, after proving that transformers computes the logits that
    the training engine had.

    Example: hfscale export runs/quickstart exports/quickstart
    """
    from hfscale.run.look import look_at_export

    look_at_export(model, out)
    from hfscale.jobs.export import run

    permit(permissions)
    typer.echo(run(model, out, adapter=adapter))
