"""All checks, in the order in which they are looked at: one row each, with what a run needs of it
and what to do where that is not there.

    read   what can be known without running: `--dry-run` refuses what fails, `hfscale doctor` lists
           it
    node   what each node says of itself and is measured at: `hfscale doctor`
    run    what only a run in small shows: `hfscale rehearse`

To add one: a row here, and a function that yields what it finds (``Finding``). One of ``read``
takes a ``Start``, one of ``node`` a ``Node``; what it raises is a failure with the error's own
remedy. One of ``run`` takes what a rehearsal has shown, and the name of its row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from hfscale.checks.needs import Need, Needs

Depth = Literal["read", "node", "run"]
FOLDER = "choose another run.root"
SLOW_NODE = "look at what else runs there, and how it is mounted or cabled; or leave the node out"


@dataclass(frozen=True)
class Check:
    """A row. ``look`` is "module:function", imported when it is used."""

    name: str
    depth: Depth
    look: str
    remedy: str
    need: Callable[[Needs], Need] | None = None  # of a measurement
    alone: str = ""  # the remedy where most nodes pass and some do not; "": the same
    each_rank: bool = True  # else the first rank of each node looks for all of them
    alike: bool = False  # what nodes must have in common


def _always(least: float, how: str, *, fatal: float = 0.0) -> Callable[[Needs], Need]:
    """Return a need that is the same for every run."""
    return lambda needs: Need(least, how, fatal=fatal)


def _shown(name: str, look: str, *, remedy: str) -> Check:
    """Return a check of depth `run`: ``look`` reads what the rehearsal has written."""
    return Check(name, "run", f"hfscale.rehearsal.verdict:{look}", remedy)


CHECKS = (
    # ------------------------------------------------------------------------------------- read
    Check(
        "Slurm",
        "read",
        "hfscale.checks.start:slurm",
        remedy="ask whoever runs the cluster",
    ),
    Check(
        "config",
        "read",
        "hfscale.checks.start:config",
        remedy="say it otherwise in the config, or on the command line",
    ),
    Check(
        "allocation",
        "read",
        "hfscale.checks.start:allocation",
        remedy="the allocation wins; ask for another one if that is not what you want",
    ),
    Check(
        "scripts",
        "read",
        "hfscale.checks.start:scripts",
        remedy="mend the script that is named",
    ),
    Check(
        "request",
        "read",
        "hfscale.checks.start:request",
        remedy="ask for less: cluster.time, or another cluster.partition",
    ),
    Check(
        "parts",
        "read",
        "hfscale.checks.start:parts",
        remedy="mend the part that is named",
    ),
    Check(
        "folder",
        "read",
        "hfscale.checks.places:folder",
        remedy=f"mend its permissions, or {FOLDER}",
    ),
    Check(
        "free space",
        "read",
        "hfscale.checks.places:free_space",
        need=Needs.free_space,
        remedy=f"make room, {FOLDER}, or keep fewer checkpoints (checkpoint.keep_last)",
    ),
    Check(
        "inodes",
        "read",
        "hfscale.checks.places:inodes",
        need=_always(10_000, "logs, checkpoints and caches are thousands of files", fatal=100),
        remedy=f"remove small files there, or {FOLDER}",
    ),
    Check(
        "quota",
        "read",
        "hfscale.checks.places:quota",
        need=Needs.free_space,
        remedy=f"remove what is yours there, ask for more, or {FOLDER}",
    ),
    # ------------------------------------------------------------------------------------- node
    Check(
        "packages",
        "node",
        "hfscale.checks.machine:packages",
        remedy="pip install -c constraints.txt -e . in the folder of the checkout",
        each_rank=False,
        alike=True,
    ),
    Check(
        "GPU",
        "node",
        "hfscale.checks.gpu:gpu",
        remedy="look at `nvidia-smi` on the node; torch must be a build for CUDA that its driver "
        "knows",
        alike=True,
    ),
    Check(
        "GPU memory",
        "node",
        "hfscale.checks.gpu:gpu_memory",
        need=Needs.gpu_memory,
        remedy="a higher engine.zero_stage, engine.offload, or more GPUs",
        alone="`nvidia-smi` names the processes that hold it: end them",
    ),
    Check(
        "GPU health",
        "node",
        "hfscale.checks.gpu:health",
        remedy="leave the node out and have it looked at: `nvidia-smi -q -d ECC,PERFORMANCE`, "
        "`dmesg | grep Xid`",
        each_rank=False,
    ),
    Check(
        "memory",
        "node",
        "hfscale.checks.machine:memory",
        need=Needs.memory,
        remedy="end what takes it, or ask for more (cluster.sbatch.mem); less is needed with a "
        "higher engine.zero_stage",
        each_rank=False,
    ),
    Check(
        "shared memory",
        "node",
        "hfscale.checks.machine:shared_memory",
        need=_always(0.25, "NCCL's and torch's buffers between the ranks of a node"),
        remedy="make room in /dev/shm; of a container: --shm-size=1g",
        each_rank=False,
    ),
    Check(
        "matrix products",
        "node",
        "hfscale.checks.gpu:matrix_products",
        remedy="see what else runs there, with `top` or `nvidia-smi`; GPUs: "
        "`nvidia-smi -q -d PERFORMANCE,TEMPERATURE`",
    ),
    Check(
        "memory speed",
        "node",
        "hfscale.checks.gpu:memory_speed",
        remedy="see what else runs there, with `top` or `nvidia-smi`",
    ),
    Check(
        "deepspeed",
        "node",
        "hfscale.checks.machine:deepspeed",
        remedy="hfscale needs none of them; `ds_report` says more",
        each_rank=False,
    ),
    Check(
        "open files",
        "node",
        "hfscale.checks.machine:open_files",
        need=_always(4096, "a rank maps a file for each lane of data", fatal=512),
        remedy="`ulimit -n 65536` in slurm/site.sh or your shell",
        each_rank=False,
    ),
    Check(
        "file size",
        "node",
        "hfscale.checks.machine:file_size",
        need=Needs.file_size,
        remedy="`ulimit -f unlimited` in slurm/site.sh or your shell",
        each_rank=False,
    ),
    Check(
        "threads",
        "node",
        "hfscale.checks.machine:threads",
        remedy="say a number in slurm/site.sh or your shell, or leave it to the launcher",
        each_rank=False,
    ),
    Check(
        "locked memory",
        "node",
        "hfscale.checks.machine:locked_memory",
        remedy="InfiniBand needs `ulimit -l unlimited`: memlock in limits.conf, "
        "PropagateResourceLimitsExcept=MEMLOCK in slurm.conf",
        each_rank=False,
    ),
    Check(
        "shared files",
        "node",
        "hfscale.checks.disks:shared_files",
        remedy=f"the node lacks the file system of the run: have it mounted, or {FOLDER}",
        each_rank=False,
    ),
    Check(
        "locks",
        "node",
        "hfscale.checks.disks:locks",
        remedy="hfscale does without: a run directory is then held by a lease, and the start "
        "after a crash waits 5 s",
        each_rank=False,
    ),
    Check(
        "writing",
        "node",
        "hfscale.checks.disks:writing",
        need=Needs.writing,
        remedy=f"a save would not be done in time: a longer cluster.signal_s, or {FOLDER}",
        alone=SLOW_NODE,
        each_rank=False,
    ),
    Check(
        "reading",
        "node",
        "hfscale.checks.disks:reading",
        need=Needs.reading,
        remedy="training would wait for data: copy the shards to a faster file system",
        alone=SLOW_NODE,
    ),
    Check(
        "rendezvous",
        "node",
        "hfscale.checks.network:rendezvous",
        remedy="a node that failed above, a firewall, or the wrong network: NCCL_SOCKET_IFNAME, "
        "GLOO_SOCKET_IFNAME in slurm/site.sh",
    ),
    Check(
        "all-reduce",
        "node",
        "hfscale.checks.network:all_reduce",
        need=Needs.all_reduce,
        remedy="is it the right network? NCCL_SOCKET_IFNAME, NCCL_IB_HCA in slurm/site.sh; "
        "NCCL_DEBUG=INFO says which it took; a lower engine.zero_stage sends less",
    ),
    Check(
        "clocks",
        "node",
        "hfscale.checks.network:clocks",
        remedy="turn on NTP on the node: authentication and the times of files go by its clock",
    ),
    Check(
        "answer",
        "node",
        "",  # of a node that says nothing: who listens notes it
        remedy="are the checkout and its Python there? or it hangs on a file system or device: "
        "leave the node out",
    ),
    # -------------------------------------------------------------------------------------- run
    _shown("end", "end", remedy="see the logs"),
    _shown("data", "data", remedy="`hfscale shards verify` finds all that are damaged"),
    _shown(
        "start",
        "start",
        remedy="see --ntasks-per-node and --gpus-per-node in cluster: and in the script",
    ),
    _shown(
        "time limit",
        "fault",
        remedy="the script's --signal=USR1@N does not reach the ranks: compare it with "
        "slurm/train.sbatch that hfscale brings, or ask whether the site filters signals",
    ),
    _shown("signal", "fault", remedy="compare the script with slurm/train.sbatch"),
    _shown("all ranks killed", "fault", remedy="compare the script with slurm/train.sbatch"),
    _shown("one rank stopped", "fault", remedy="compare the script with slurm/train.sbatch"),
    _shown("exact", "exact", remedy="`hfscale prove resume CONFIG` looks closer"),
    _shown(
        "one writer",
        "one_writer",
        remedy="two jobs write in one run directory: is it the same one on all nodes?",
    ),
    _shown("another world size", "command", remedy="report it: this is a defect of hfscale"),
    _shown("evaluation", "command", remedy="see the logs"),
    _shown("export", "command", remedy="see the logs"),
    _shown(
        "a full disk",
        "full_disk",
        remedy=f"make room, {FOLDER}, or keep fewer: checkpoint.keep_last=1",
    ),
)
BY_NAME = {check.name: check for check in CHECKS}


def of_depth(depth: Depth) -> list[Check]:
    """Return the checks of one depth that have something to look at."""
    return [check for check in CHECKS if check.depth == depth and check.look]
