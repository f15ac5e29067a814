"""A rehearsal without a cluster: the job's own script and site.sh on a Slurm of this machine alone,
which is made for it and taken down afterwards.

What only the cluster itself shows (its queue, partition, account, network, nodes) is left out, and
the verdict says so.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

from hfscale.config.schema import Cluster
from hfscale.dist.world import available_cores
from hfscale.log import logger
from launch import private_slurm
from launch.local import gpu_count
from launch.private_slurm import Machines, can_name_nodes, this_host
from launch.slurm import tasks_per_node

NODES = ("private1", "private2")
PARTITION = "PartitionName=private Nodes=ALL Default=YES MaxTime=UNLIMITED DefaultTime=60"
OURS = ("cpus-per-task", "exclusive", "oversubscribe")  # what of cluster.sbatch means the same here
CPUS, RANKS = "cpus-per-task", "ntasks-per-node"
LEFT_OUT = {
    "the cluster itself": "a private Slurm of this machine stood in for it: queue, partition, "
    "account, nodes and network are not tried"
}


@contextmanager
def stand_in(cluster: Cluster) -> Iterator[list[str]]:
    """Yield the overrides by which a job of ``cluster`` is one of this machine's; inside, whatever
    asks Slurm asks a private one.

    Raises:
        ConfigError: if its programs are not here, or it does not come up.
    """
    private_slurm.refuse_missing()
    machines, overrides = stands_for(cluster)
    before = dict(os.environ)
    with private_slurm.running(machines) as slurm:
        nodes = " and ".join(machines.nodes)
        logger.info(f"a private Slurm on this machine: {nodes}, {machines.gpus} GPUs each")
        os.environ.clear()
        os.environ.update(slurm.env)
        try:
            yield overrides
        finally:
            os.environ.clear()
            os.environ.update(before)


def stands_for(cluster: Cluster) -> tuple[Machines, list[str]]:
    """Return the private Slurm that takes a job of ``cluster`` in small, and the job's overrides:
    as many ranks and GPUs as there are here.
    """
    all_gpus, asked = gpu_count(), tasks_per_node(cluster)
    count = min(2, cluster.nodes) if can_name_nodes() else 1
    if cluster.gpus_per_node and all_gpus:
        count = min(count, all_gpus)
        gpus = min(cluster.gpus_per_node, all_gpus // count)
        ranks = min(asked, gpus)
    else:
        gpus, ranks = 0, min(asked, max(1, available_cores() // count))
    of_job = {name: value for name, value in cluster.sbatch.items() if name in OURS}
    each = int(str(of_job.get(CPUS, 1)))
    machines = Machines(
        NODES[:count] if can_name_nodes() else (this_host(),),
        cpus=max(available_cores(), ranks * each),
        memory_mb=_memory_mb() // count,
        gpus=gpus,
        partitions=PARTITION,
    )
    return machines, [
        f"cluster.nodes={count}",
        "cluster.min_nodes=null",
        f"cluster.gpus_per_node={gpus or 'null'}",
        "cluster.partition=null",
        "cluster.allow_local_disk=true",  # all nodes are this machine
        f"cluster.sbatch={json.dumps(of_job | {RANKS: ranks})}",
    ]


def _memory_mb() -> int:
    pages = int(os.sysconf("SC_PHYS_PAGES"))
    return pages * int(os.sysconf("SC_PAGE_SIZE")) // 2**20
