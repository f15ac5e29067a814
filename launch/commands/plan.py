"""`hfscale plan`: memory, speed and cost of a config before it is submitted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hfscale.config.permission import grant
from hfscale.errors import ConfigError, shown
from launch.request import quote

if TYPE_CHECKING:
    from hfscale.planning.site import Measured

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="key=value...", help="Dotted overrides.", show_default=False),
]
Gpu = Annotated[
    str | None,
    typer.Option(
        "--gpu",
        help="h100, h200, a100-80, b200, l40s, mi300x, rtx4090, cpu, ...; default: the one here.",
        show_default=False,
    ),
]
Gpus = Annotated[
    int | None,
    typer.Option("--gpus", min=1, help="In all; default: as cluster says.", show_default=False),
]
Nodes = Annotated[
    int | None, typer.Option("--nodes", min=1, help="That share them.", show_default=False)
]
Network = Annotated[
    float | None,
    typer.Option(
        "--network",
        min=1e-6,
        help="GB/s that a GPU has to another node; default: of the vendor's own node.",
        show_default=False,
    ),
]
Memory = Annotated[
    float | None,
    typer.Option("--memory", min=0.1, help="GiB of one GPU, or rank.", show_default=False),
]
Doctor = Annotated[
    Path | None,
    typer.Option(
        "--doctor",
        metavar="FILE",
        help="What `hfscale doctor --json` measured: its network, disk, and speed of cores.",
        show_default=False,
    ),
]


def plan(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A YAML file, or a run directory.")
    ],
    overrides: Overrides = None,
    gpu: Gpu = None,
    gpus: Gpus = None,
    nodes: Nodes = None,
    network: Network = None,
    memory: Memory = None,
    doctor: Doctor = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say how every number comes about.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    checked: Annotated[
        bool,
        typer.Option("--check", help="CONFIG is a run: compare what it took with its plan."),
    ] = False,
) -> None:
    """Say what CONFIG will take, without a GPU and without building the model: memory a rank by
    part, whether it fits, speed, the end of the run, GPU-hours, disk; and which ZeRO stage and
    micro-batch to choose. Data and tokenizer need not be there.

    Examples: hfscale plan configs/pretrain/llama_1b.yaml --gpu h100 --gpus 8; hfscale plan
    runs/first --gpu a100-80 --explain
    """
    from hfscale.checks.measured import read_measured
    from hfscale.planning.plan import make_plan
    from hfscale.planning.site import Asked
    from launch.request import Request

    measured = read_measured(doctor) if doctor else None
    if checked:
        given = [*(overrides or ()), *filter(None, (gpu, gpus, nodes, network, memory))]
        _check(config, given=given, measured=measured)
        return
    grant(overrides or ())
    wanted = Request(config, tuple(overrides or ())).load().config
    made = make_plan(wanted, Asked(gpu, gpus, nodes, network, memory, measured=measured))
    if as_json:
        typer.echo(made.to_json())
        return
    typer.echo("\n".join(map(shown, made.text(explain=explain).splitlines())))


def _check(run: str, *, given: list[object], measured: Measured | None) -> None:
    """Print what a run took beside its plan, which it keeps.

    Raises:
        ConfigError: if the command line says anything else: the run itself says it.
    """
    from hfscale.planning.check import check
    from launch.request import training_run

    if given:
        raise ConfigError(
            "a run that is checked says itself what it ran on",
            where="command line",
            value=given[0],
            remedy=f"hfscale plan --check {quote(run)}",
        )
    typer.echo(
        "\n".join(map(shown, check(training_run(run), measured=measured).text().splitlines()))
    )
