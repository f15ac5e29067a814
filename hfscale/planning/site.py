"""Where a plan is for: which devices on how many nodes, and how fast they compute, send and write:
by what `hfscale doctor` measured there, else by the table of devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from hfscale.config.schema import TrainConfig
from hfscale.errors import ConfigError
from hfscale.models.devices import CPU, GB, Device, device_named, device_seen
from hfscale.planning.figures import GIB, count

MEMORY_FILE = Path("/proc/meminfo")
# of the peaks on data sheets, what large operators reach (assumed; `--check` learns what they do)
ARITHMETIC, TRAFFIC, WIRE = 0.70, 0.80, 0.75
# of the speed at which a core copies memory, what operators reach that make new tensors: fresh
# pages, exponentials and divisions take most of it (by a fit to benchmarks/plan.py)
TOUCHED = 0.28
# of the rate of square products that doctor measures, what those of a model reach (by the same fit)
PRODUCTS = 0.85
DISK_SPEED = 1 * GB  # bytes a second that a node writes (assumed)
BUS_SPEED = 25 * GB  # between a GPU and its host (assumed)


@dataclass(frozen=True)
class Measured:
    """What `hfscale doctor` measured, of the slowest rank or node. Speeds are bytes a second; None
    and what is missing were not measured.
    """

    source: str  # its file
    nodes: int
    on_cpu: bool
    exchange: float | None = None  # of a rank, while all sum together
    disk: float | None = None  # of a node that writes
    memory: float | None = None  # of a rank that copies: read and written
    flops: Mapping[str, float] = field(default_factory=dict)  # flop/s of a rank, by precision


@dataclass(frozen=True)
class Asked:
    """What the command line says of the place of a plan; None: the config's cluster decides."""

    gpu: str | None = None
    gpus: int | None = None
    nodes: int | None = None
    network_gb_s: float | None = None
    memory_gib: float | None = None
    corrected: bool = True  # by the checked runs of the same root
    measured: Measured | None = None


@dataclass(frozen=True)
class Rate:
    """How fast something goes, a second, and how that is known."""

    speed: float
    how: str


@dataclass(frozen=True)
class Site:
    """``ranks`` devices, ``a_node`` of them on each node."""

    device: Device
    ranks: int
    a_node: int
    network: float | None  # bytes a second of a device to one of another node
    memory_bytes: float  # of one device
    measured: Measured | None = None

    @property
    def on_cpu(self) -> bool:
        """Whether ranks compute on cores."""
        return self.device.key == CPU.key

    @property
    def nodes(self) -> int:
        """How many there are."""
        return self.ranks // self.a_node

    @property
    def rates(self) -> Measured | None:
        """What was measured, if that was of the same kind of ranks."""
        seen = self.measured
        return seen if seen and seen.on_cpu == self.on_cpu else None

    def flops(self, precision: str) -> Rate:
        """Return the flop/s that large products reach. Of GPUs the data sheet says it: the MFU is
        measured against that.
        """
        seen = self.rates.flops.get(precision) if self.rates and self.on_cpu else None
        if seen:
            how = f"{PRODUCTS:.0%} of {count(seen)} flop/s, as doctor measured"
            return Rate(PRODUCTS * seen, how)
        peak = self.device.peak(precision)
        return Rate(ARITHMETIC * peak, f"{ARITHMETIC:.0%} of {count(peak)} flop/s")

    @property
    def memory(self) -> Rate:
        """Bytes a second that are read and written of a device's own memory, in place."""
        if self.rates and self.on_cpu and self.rates.memory:
            seen = self.rates.memory
            return Rate(seen, f"{seen / GB:,.4g} GB/s, as doctor measured")
        peak, part = self.device.memory_speed, 1.0 if self.on_cpu else TRAFFIC
        return Rate(part * peak, f"{part:.0%} of {peak / GB:,.4g} GB/s")

    @property
    def traffic(self) -> Rate:
        """The same of operators that make new tensors."""
        if not self.on_cpu:
            return self.memory
        return Rate(TOUCHED * self.memory.speed, f"{TOUCHED:.0%} of {self.memory.how}")

    @property
    def exchange(self) -> Rate:
        """Bytes a second that a rank sends in a ring over all."""
        device = self.device
        if self.rates and self.rates.exchange and (self.rates.nodes > 1) == (self.nodes > 1):
            seen = self.rates.exchange
            return Rate(seen, f"as doctor measured over {_nodes(self.rates.nodes)}")
        if self.nodes == 1:
            return Rate(WIRE * device.link, f"{device.link / GB:.4g} GB/s in a node x {WIRE}")
        assert self.network is not None, "who made the site has asked for it"
        together = min(device.link, self.network * self.a_node)
        how = (
            f"the least of {device.link / GB:.4g} GB/s in a node and {self.a_node} x "
            f"{self.network / GB:.4g} GB/s between nodes, x {WIRE}"
        )
        return Rate(WIRE * together, how)

    @property
    def disk(self) -> Rate:
        """Bytes a second that a node writes."""
        if self.measured and self.measured.disk:
            seen = self.measured.disk
            return Rate(seen, f"{seen / GB:.4g} GB/s a node, as doctor measured")
        return Rate(DISK_SPEED, f"{DISK_SPEED / GB:.4g} GB/s a node (assumed)")

    def assumed(self) -> Iterator[str]:
        """Yield what nobody has measured, and what of a measurement is of no use here."""
        if not (self.measured and self.measured.disk):
            yield (
                f"a disk that writes {DISK_SPEED / GB:g} GB/s a node (--doctor FILE: what "
                "`hfscale doctor --json` measured)"
            )
        if self.measured and self.rates is None:
            kind = "cores" if self.measured.on_cpu else "GPUs"
            yield f"{self.measured.source} is of ranks on {kind}: of it only the disk is taken"
        elif self.rates and self.rates.exchange and (self.rates.nodes > 1) != (self.nodes > 1):
            yield (
                f"{self.rates.source} was measured on {_nodes(self.rates.nodes)}, the plan is for "
                f"{_nodes(self.nodes)}: of it the network is not taken"
            )


def _nodes(number: int) -> str:
    return "one node" if number == 1 else f"{number} nodes"


def site_of(config: TrainConfig, asked: Asked) -> Site:
    """Return where a run of ``config`` is planned to run.

    Raises:
        ConfigError: for an unknown GPU, a number of GPUs that nodes cannot share, or several nodes
            of which nothing says how fast they are joined.
    """
    cluster = config.cluster
    device = device_named(asked.gpu) if asked.gpu else _device_here()
    usual = cluster.gpus_per_node or device.a_node
    ranks, nodes = asked.gpus, asked.nodes
    if ranks is None:
        nodes = nodes or cluster.nodes
        here = cluster.gpus_per_node or (device.a_node if nodes > 1 or device is CPU else 1)
        ranks = nodes * here
    nodes = nodes or max(1, -(-ranks // usual))
    if ranks % nodes:
        raise ConfigError(
            f"{ranks} GPUs cannot be shared by {nodes} nodes",
            where="--gpus, --nodes",
            value=ranks,
            remedy=f"--gpus {max(nodes, ranks - ranks % nodes)} would do",
        )
    # what the command line says of the network wins over what was measured
    measured = asked.measured
    if measured and asked.network_gb_s and nodes > 1:
        measured = replace(measured, exchange=None)
    network = asked.network_gb_s * GB if asked.network_gb_s else device.network
    held = asked.memory_gib or device.memory_gib or _memory_here_gib() / ranks
    site = Site(device, ranks, ranks // nodes, network, held * GIB, measured)
    joined = site.rates is not None and site.rates.exchange and site.rates.nodes > 1
    if nodes > 1 and network is None and not joined:
        raise ConfigError(
            f"nothing says how fast nodes with {device.name} are joined",
            where="--network",
            value=None,
            remedy="give what one GPU has of it in GB/s: --network 12.5 (100 Gb/s); or what "
            "`hfscale doctor --json` measured between nodes: --doctor FILE",
        )
    return site


def _device_here() -> Device:
    import torch

    if not torch.cuda.is_available():
        return CPU
    name = torch.cuda.get_device_name()
    if known := device_seen(name):
        return known
    raise ConfigError(
        "this GPU is not in the table of devices",
        where="--gpu",
        value=name,
        remedy="name the nearest one with --gpu, and its memory with --memory",
    )


def _memory_here_gib() -> float:
    lines = MEMORY_FILE.read_text().splitlines()
    return next(int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemTotal"))
