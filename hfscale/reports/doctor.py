"""From what the ranks found on their nodes to a verdict: what is wrong, where, what to do, and
which nodes a job should leave out.

A node is bad if it fails what other nodes pass, or does not answer. What all nodes fail is no
node's fault.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

from hfscale.errors import UserError, shown

MARK = "hfscale-doctor "  # begins a finding on a rank's stdout
STATES = ("ok", "warn", "fail")
ALIKE = ("packages", "GPU")  # what nodes must have in common
REMEDIES = {  # of the findings that bring none along
    "Slurm": "ask whoever runs the cluster",
    "allocation": "the allocation wins; ask for another one if that is not what you want",
    "packages": "pip install -c constraints.txt -e . in the folder of the checkout",
    "GPU": "look at `nvidia-smi` on the node; torch must be a build for CUDA that its driver knows",
    "GPU memory": "`nvidia-smi` names the processes that hold it: end them",
    "memory": "end what takes it, or ask for more (--mem)",
    "matrix products": "see what else runs there, with `top` or `nvidia-smi`; GPUs: "
    "`nvidia-smi -q -d PERFORMANCE,TEMPERATURE`",
    "open files": "a rank maps a file for each lane of data: `ulimit -n 65536` in "
    "slurm/site.sh or your shell",
    "locked memory": "InfiniBand needs `ulimit -l unlimited`: memlock in limits.conf, "
    "PropagateResourceLimitsExcept=MEMLOCK in slurm.conf",
    "shared files": "the node lacks the file system of the run: have it mounted, or choose "
    "another run.root",
    "free space": "make room, choose another run.root, or keep fewer checkpoints "
    "(checkpoint.keep_last)",
    "inodes": "remove small files there, or choose another run.root",
    "locks": "hfscale does without: a run directory is then held by a lease, and the start "
    "after a crash waits 5 s",
    "writing": "mend the folder, or choose another run.root; where it is only slow, save less "
    "often",
    "reading": "training would wait for data: copy the shards to a faster file system",
    "request": "ask for less: cluster.time, or another cluster.partition",
    "answer": "are the checkout and its Python there? or it hangs on a file system or device: "
    "leave the node out",
    "rendezvous": "a node that failed above, a firewall, or the wrong network: "
    "NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME in slurm/site.sh",
    "all-reduce": "is it the right network? NCCL_SOCKET_IFNAME, NCCL_IB_HCA in slurm/site.sh; "
    "NCCL_DEBUG=INFO says which it took",
    "clocks": "turn on NTP on the node: authentication and the times of files go by its clock",
}


@dataclass
class Work:
    """What the ranks look at, beside their machines."""

    run: str = ""  # the folder of the run
    token: str = ""  # a file that was written there just now
    gpus: bool = False  # there should be some
    shards: list[str] = field(default_factory=list)
    remote: dict[str, object] = field(default_factory=dict)  # how these are fetched
    checkpoint_gb: float = 0.0
    keep: int = 2  # checkpoints


@dataclass(frozen=True)
class Finding:
    """One line of the table. A measurement of a rank has a ``value``, and is bad if it is too small
    a part of what others have.
    """

    check: str
    state: str
    said: str
    remedy: str = ""
    nodes: tuple[str, ...] = ()
    value: float | None = None
    unit: str = ""
    # below which part of the median of all ranks it is a warning, a failure
    slow: tuple[float, float] = (
        0.0,
        0.0,
    )


def failed(check: str, error: Exception) -> Finding:
    """Return a check that ended in an error."""
    if not isinstance(error, UserError):
        return Finding(check, "fail", f"{type(error).__name__}: {error}")
    return Finding(
        check,
        "fail",
        f"{error.what}: {error.where}" + ("" if error.value is None else f": {error.value}"),
        error.remedy,
    )


def judge(found: Sequence[Finding], *, nodes: Collection[str]) -> list[Finding]:
    """Return the findings of all ranks, each with its node; those that say the same are one, with
    its nodes if they are not all of them.
    """
    judged = []
    for check in dict.fromkeys(one.check for one in found):
        groups: dict[Finding, set[str]] = {}
        for one in _measured_by_all([one for one in found if one.check == check]):
            groups.setdefault(replace(one, nodes=(), value=None), set()).update(one.nodes)
        common = max(groups, key=lambda one: len(groups[one]))
        for one, there in groups.items():
            if check in ALIKE and one.state == "ok" and one != common:
                one = replace(
                    one,
                    state="warn",
                    said=f"{one.said}; most nodes: {common.said}",
                    remedy="make the nodes alike",
                )
            remedy = "" if one.state == "ok" else one.remedy or REMEDIES.get(check, "")
            judged.append(
                replace(
                    one, remedy=remedy, nodes=() if there >= set(nodes) else tuple(sorted(there))
                )
            )
    return judged


def _measured_by_all(found: Sequence[Finding]) -> list[Finding]:
    """Return the findings of a check with what each measurement means beside the others. A range is
    of those that are ok.
    """
    measured = [one for one in found if one.value is not None and one.state == "ok"]
    usual = statistics.median_high(
        [one.value or 0.0 for one in found if one.value is not None] or [0.0]
    )
    states = {
        id(one): STATES[sum((one.value or 0.0) < part * usual for part in one.slow)]
        for one in measured
    }
    fine = [one.value or 0.0 for one in measured if states[id(one)] == "ok"]
    judged = []
    for one in found:
        if (state := states.get(id(one))) == "ok":
            edges = dict.fromkeys(f"{edge(fine):.3g}" for edge in (min, max))
            one = replace(one, said=f"{' to '.join(edges)} {one.unit}")
        elif state is not None:
            words = f"{one.value:.3g} (median of all ranks: {usual:.3g}) {one.unit}"
            one = replace(one, state=state, said=words)
        judged.append(one)
    return judged


def bad_nodes(findings: Iterable[Finding]) -> list[str]:
    """Return the nodes that failed something which not all nodes failed. To meet is a matter of
    all.
    """
    return sorted(
        {
            node
            for one in findings
            if one.state == "fail" and one.check != "rendezvous"
            for node in one.nodes
        }
    )


def table(findings: Sequence[Finding]) -> str:
    """Return the findings as lines, with what to do below those that are not ok."""
    width = max(len(one.check) for one in findings)
    lines = []
    for one in findings:
        nodes = f"{', '.join(one.nodes)}: " if one.nodes else ""
        lines.append(f"{one.state:<6}{one.check:<{width}}  {nodes}{shown(one.said, lines=True)}")
        if one.remedy:
            lines.append(f"{'':{width + 8}}-> {one.remedy}")
    return "\n".join(lines)
