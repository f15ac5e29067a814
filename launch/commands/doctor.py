"""`hfscale doctor`: what can be known of a job before it starts, and what its nodes say of
themselves, as one table.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Annotated

import typer

from hfscale.checks.finding import Finding, product_rate
from hfscale.checks.judge import bad_nodes, judge, table
from hfscale.checks.needs import Needs, with_memory
from hfscale.checks.node import Task
from hfscale.checks.start import read
from hfscale.config.permission import grant
from hfscale.config.schema import Cluster, RunConfig
from hfscale.dist.world import Allocation, allocation, available_cores, node_name
from launch.job import Training
from launch.local import gpu_count
from launch.nodes import measure
from launch.queue import client, has_slurm, queue_says, ranks_per_node
from launch.request import Request
from launch.share import scripts_home
from launch.slurm import Submission
from launch.start import Start


def doctor(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG",
            help="A YAML file, or a run directory. Without it: the machine alone.",
            show_default=False,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="key=value...", help="Dotted overrides.", show_default=False),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help='Print JSON: "ok", "nodes", "bad_nodes" to leave out, "findings".'
        ),
    ] = False,
) -> None:
    """Check and measure what a run needs: this machine or, inside an allocation, each of its nodes.
    Takes less than a minute.

    Each line says what there is and what the run needs of it. The exit code is 1 if anything
    failed. Nodes that a job should leave out are named. Examples: hfscale doctor; hfscale doctor
    configs/pretrain/gpt2_small.yaml; hfscale doctor runs/first --json
    """
    grant(overrides or ())
    wanted = Training(Request(config, tuple(overrides or ()))) if config else None
    here = allocation()
    nodes = _names(here)
    procs = here.nodes * ranks_per_node(here) if here else gpu_count() or min(2, available_cores())
    start = _start(wanted, here, procs=procs)
    findings = list(read(start))
    findings += measure(
        start.folder,
        _task(wanted, gpus=(here.gpus_per_node if here else gpu_count()) > 0),
        here=here,
        names=nodes,
        procs=procs,
        home=scripts_home(wanted.cluster if wanted else Cluster()),
    )
    needs = with_rate(start.needs, findings)
    if isinstance(start, Submission) and not here:  # the nodes are others than this one
        needs = replace(needs, elsewhere=True)
    elif wanted and needs.parameters:
        needs = with_memory(needs, wanted.config)
    judged = judge(findings, nodes=nodes, needs=needs)
    bad, ok = bad_nodes(judged), all(one.state != "fail" for one in judged)
    if as_json:
        lines = [asdict(one) for one in judged]
        report = {"ok": ok, "nodes": nodes, "bad_nodes": bad, "findings": lines}
        print(json.dumps(report, indent=1, ensure_ascii=False))
    else:
        leave_out = [f"nodes to leave out: --exclude={','.join(bad)}"] if bad else []
        print(table(judged), *leave_out, sep="\n")
    raise typer.Exit(0 if ok else 1)


def with_rate(needs: Needs, findings: Sequence[Finding]) -> Needs:
    """Return the needs of a run whose ranks multiply matrices as fast as the slowest was
    measured.
    """
    unit = product_rate(needs.precision)
    rates = [one.value for one in findings if one.unit == unit and one.value]
    return replace(needs, rank_flops=1e12 * min(rates)) if rates else needs


def _names(here: Allocation | None) -> list[str]:
    """Return the nodes that are looked at."""
    names = []
    if here and has_slurm():
        names = client(["scontrol", "show", "hostnames", here.node_list]).stdout.split()
    return names or [node_name()]


def _start(wanted: Training | None, here: Allocation | None, *, procs: int) -> Start:
    """Return what would be started: on nodes of Slurm where it answers, else on this machine."""
    answers, words = queue_says(here)
    if wanted and (here or (answers and has_slurm())):
        return Submission(wanted, here=here)
    return Start(wanted, procs=procs, gpus=gpu_count() > 0, slurm=(answers, words))


def _task(wanted: Training | None, *, gpus: bool) -> Task:
    """Return what the ranks are to look at."""
    task = Task(gpus=gpus)
    if wanted and isinstance(
        wanted.config, RunConfig
    ):  # labelled examples lie in a few small files
        task.shards = [source.shards for source in wanted.config.data.sources]
        task.remote = wanted.config.data.remote
    return task
