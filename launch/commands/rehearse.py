"""`hfscale rehearse`: the life cycle of a run in small, before GPUs burn."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from hfscale import run_files
from hfscale.config.permission import grant
from hfscale.config.schema import RunConfig
from hfscale.dist.world import allocation
from hfscale.errors import CheckpointError, ConfigError, nearest
from hfscale.log import logger
from hfscale.monitor.fence import newest
from hfscale.registry import load_plugin
from hfscale.shards.files import write_atomically
from launch.interpreter import python
from launch.job import Training
from launch.queue import has_slurm, queue_says, refuse_holder
from launch.request import LAUNCHERS, Request, refuse_copies
from launch.slurm import tasks_per_node

if TYPE_CHECKING:  # slow to import
    from hfscale.rehearsal.verdict import Verdict
    from launch.rehearsal.where import Where

Config = Annotated[
    str,
    typer.Argument(metavar="CONFIG", help="A YAML file, or a run directory, which is not touched."),
]
Overrides = Annotated[
    Optional[list[str]],
    typer.Argument(metavar="key=value...", help="As for pretrain or finetune.", show_default=False),
]
Launcher = Annotated[str, typer.Option(help="local: ranks here; slurm: one real job.")]
Private = Annotated[
    bool,
    typer.Option(
        "--private-slurm",
        help="One job of a Slurm of this machine alone, made for it: where no cluster is near.",
    ),
]
Procs = Annotated[
    Optional[int],
    typer.Option(min=1, help="Ranks, of local. Without it: one a GPU, or 2 on the CPU."),
]
Keep = Annotated[bool, typer.Option("--keep", help="Keep the folder, also where all is well.")]
Skip = Annotated[
    Optional[list[str]],
    typer.Option(metavar="NAME", help="Leave this out, by its name in the report. Repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the verdict for scripts.")]


def rehearse(
    config: Config,
    overrides: Overrides = None,
    launcher: Launcher = "local",
    private: Private = False,
    procs: Procs = None,
    keep: Keep = False,
    skip: Skip = None,
    as_json: Json = False,
) -> None:
    """Go through the life of a run in small: a short run of CONFIG with a small model of its
    architecture, which is signalled, killed, hung, resumed, evaluated and exported, and compared
    with an undisturbed twin.

    The exit code is 1 if something went wrong; then the folder beside the run is kept. Examples:
    hfscale rehearse configs/pretrain/gpt2_small.yaml --procs 2; hfscale rehearse
    configs/pretrain/gpt2_small.yaml --launcher slurm cluster.nodes=4 cluster.gpus_per_node=8;
    without a cluster: hfscale rehearse CONFIG --private-slurm
    """
    refuse_copies()
    grant(overrides or ())
    launcher = "slurm" if private else launcher
    _refuse_launcher(launcher, private=private)
    job = Training(Request(config, tuple(overrides or ()), procs=procs))
    _refuse_under_way(job.folder)
    with _stand_in(job, private=private) as there:
        _dry_run(there.request, launcher)
        with _home(job, keep=keep) as home:
            verdict = _rehearsed(job, there, home, launcher, skip or [])
            if verdict.passed and not keep:
                shutil.rmtree(home)
    if as_json:
        typer.echo(json.dumps(verdict.as_dict(), indent=1, ensure_ascii=False))
    else:
        typer.echo("\n".join(verdict.lines()))
    if home.exists():
        logger.info(f"kept in {home}")
    if verdict.passed and launcher == "slurm" and not private:
        from launch.rehearsal import kept

        kept.keep(job.cluster, name=job.name, seconds=verdict.seconds)
    raise typer.Exit(0 if verdict.passed else 1)


def _refuse_launcher(launcher: str, *, private: bool) -> None:
    """Return if a rehearsal can be started so, from here.

    Raises:
        ConfigError: if not.
    """
    if launcher not in ("local", "slurm"):
        raise ConfigError(
            "no rehearsal by this launcher",
            where="--launcher",
            value=launcher,
            remedy="local or slurm",
        )
    if launcher == "local":
        return
    if here := allocation():
        raise ConfigError(
            "a rehearsal on the cluster is a job of its own, and this is one",
            where="--launcher slurm",
            value=f"job {here.job_id}",
            remedy="start it on a login node, or rehearse on this node: --launcher local",
        )
    answers, words = queue_says(None)
    if not private and not (has_slurm() and answers):
        raise ConfigError(
            "no Slurm answers here",
            where="--launcher slurm",
            value=words,
            remedy="go to a login node; or, on this machine alone: --private-slurm, which makes a "
            "Slurm for the job's own script, or --launcher local",
        )


@contextmanager
def _stand_in(job: Training, *, private: bool) -> Iterator[Training]:
    """Yield the job as Slurm is to be asked for it: itself, or one of a ``private`` Slurm.

    Raises:
        UserError: for what speaks against it where it was meant to run, and if there can be no such
            Slurm here.
    """
    if not private:
        yield job
        return
    from launch.rehearsal.private import stand_in

    cluster = job.cluster
    ranks = cluster.nodes * tasks_per_node(cluster)
    job.check(ranks, device_type="cuda" if cluster.gpus_per_node else "cpu")
    with stand_in(cluster) as ours:
        yield Training(replace(job.request, overrides=(*job.request.overrides, *ours)))


def _refuse_under_way(run_dir: Path) -> None:
    """Return if nobody trains in the run directory of the config.

    Raises:
        CheckpointError: naming who does: the next submission would be refused, rehearsed or not.
    """
    if not run_files.is_run(run_dir):
        return
    refuse_holder(run_dir)
    attempt = newest(run_dir)
    if attempt and attempt.alive():
        raise CheckpointError(
            "this run is under way",
            where=run_dir,
            value=str(attempt.owner()),
            remedy=f"rehearse what comes next under another name: run.name={run_dir.name}-next",
        )


def _dry_run(request: Request, launcher: str) -> None:
    """Return if a dry run of the config itself finds nothing against it.

    Raises:
        UserError: what it finds.
    """
    launch = load_plugin("launcher", LAUNCHERS, launcher)
    with redirect_stdout(StringIO()):  # what would run
        launch(Training(replace(request, dry_run=True)))


@contextmanager
def _home(job: Training, *, keep: bool) -> Iterator[Path]:
    """Yield the folder of a rehearsal, beside the run; after an error or Ctrl-C nothing is left,
    unless it is to be kept.

    Raises:
        ConfigError: if none can be made there.
    """
    root = job.config.run.root
    try:
        root.mkdir(parents=True, exist_ok=True)
        home = Path(tempfile.mkdtemp(prefix=f"{job.name}-rehearsal-", dir=root))
    except OSError as error:
        raise ConfigError(
            f"cannot make a folder for the rehearsal: {error.strerror}",
            where="run.root",
            value=str(root),
            remedy="choose another run.root",
        ) from None
    try:
        yield home
    except BaseException:
        if not keep:
            shutil.rmtree(home, ignore_errors=True)
        left = f"kept in {home}" if home.exists() else f"{home} is removed: nothing of it is left"
        logger.info(f"the rehearsal did not come to its end; {left}")
        raise


def _rehearsed(
    job: Training, there: Training, home: Path, launcher: str, skip: Sequence[str]
) -> Verdict:
    """Return the verdict on a rehearsal of ``job`` in ``home``, as the job ``there``."""
    from hfscale.rehearsal.plan import RUN, TIME_LIMIT
    from hfscale.rehearsal.shards import look_at_shards
    from hfscale.rehearsal.verdict import judge
    from launch.rehearsal.shrink import shrink
    from launch.rehearsal.stages import STAGES, plan_of
    from launch.rehearsal.where import here, on_cluster

    if unknown := [name for name in skip if name not in STAGES]:
        raise ConfigError(
            "a rehearsal has no such part",
            where="--skip",
            value=unknown[0],
            remedy=nearest(unknown[0], STAGES),
        )
    config, run_dir = job.config, home / RUN
    looked = look_at_shards(config) if isinstance(config, RunConfig) else None
    on_slurm = launcher == "slurm"
    if on_slurm:
        where = on_cluster(there, warned=TIME_LIMIT not in skip, private=there is not job)
    else:
        where = here(job)
    with redirect_stdout(sys.stderr):  # libraries say there what they find
        shrunk = shrink(job.request, home=home, procs=where.ranks)
    plan = plan_of(config, shrunk, where, run_dir=run_dir, skipped=skip, data=looked)
    run_dir.mkdir()
    write_atomically(run_dir / run_files.REHEARSAL, json.dumps(plan.as_dict(), indent=1).encode())
    logger.info(
        f"{shrunk.whole.words}, {_millions(shrunk.whole.parameters)}, rehearsed as "
        f"{shrunk.small.words}, {_millions(shrunk.small.parameters)}, on {where.ranks} ranks"
    )
    ours = (*there.request.overrides, *shrunk.overrides, *where.overrides, f"run.name={RUN}")
    return judge(run_dir, ended=_run(replace(job.request, overrides=ours), run_dir, where))


def _run(asked: Request, run_dir: Path, where: Where) -> str:
    """Return how the rehearsal ended, "" if its last attempt has judged."""
    if where.launcher == "slurm":
        from launch.rehearsal import cluster

        with cluster.submitted(asked):
            ended = cluster.wait(run_dir, logger.info)
        return f"{ended}: {cluster.last_words(run_dir)}" if ended else ""
    from launch.rehearsal.here import rehearse_here

    verb = Training(asked).config.verb
    words = [verb, asked.source, *asked.overrides, "--procs", where.ranks]
    return rehearse_here(python("launch.cli", *words), run_dir)


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:,.1f} M parameters"
