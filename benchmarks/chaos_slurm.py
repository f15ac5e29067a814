"""What becomes of a job on a real Slurm cluster when something fails: how soon nothing of it is
left, and how it goes on.

    # about ten minutes on 4 idle cores; root, as the Slurm tests
    python -m benchmarks.chaos_slurm [--only PART_OF_A_NAME]

One scenario after the other on the cluster of four nodes of tests/helpers/slurm.py: a run of two
ranks on two nodes, saved every fourth step, is disturbed after its fifth. Released: seconds from
the failure until no process of that attempt is left (ranks, script, and what they started). Back:
until the next attempt has logged a step. Apart: the largest difference to a loss of a run that
nobody disturbed; recovered means 0 on as many ranks, at most 1e-3 on fewer. Failures that a restart
cannot mend must end the job, say why, and go on once mended and submitted again. Hangs are given
`train.hang_timeout_s=5`; the default is ten minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import machine, record, table, verdict
from tests.helpers.cli import ROOT, hfscale
from tests.helpers.corpus import GPT2, make_corpus, run_values
from tests.helpers.slurm import Cluster, missing, running, wait_for

STEPS, AT, SAVE_EVERY, STEP_S, DISK_MB, LIMIT_S = 24, 5, 4, 0.4, 192, 60.0
CLOSE = 1e-3  # of losses near 5, after steps of another cut (fp32)
DROPOUT = dict.fromkeys(
    ("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0
)  # its masks are those of a rank, so of one world size
MODEL = {**GPT2, "config": {**GPT2["config"], **DROPOUT}}
INSIDE = "HFSCALE_CHAOS_INSIDE"  # environment variable: we are in the namespace already
Act = Callable[["Run"], Callable[[], object] | None]  # disturbs; may return how to mend it


@dataclass
class Run:
    """A submitted run."""

    cluster: Cluster
    folder: Path
    job: str
    shards: Path

    def records(self) -> list[dict[str, Any]]:
        file = self.folder / "metrics.jsonl"
        return (
            [json.loads(line) for line in file.read_text().split("\n")[:-1]]
            if file.exists()
            else []
        )

    def attempt(self) -> int:
        return max((record["attempt"] for record in self.records()), default=0)

    def steps(self, attempt: int) -> list[int]:
        return [record["step"] for record in self.records() if record["attempt"] == attempt]

    def newest(self) -> str:
        """Return the job that holds the run directory now: itself, or its successor."""
        return (self.folder / "job").read_text().strip()

    def log(self) -> str:
        return "".join(
            file.read_text(errors="replace")
            for file in sorted((self.folder / "logs").glob("*.log"))
        )


@dataclass
class Scenario:
    """``fault`` is done by the rank itself (tests/launch/faults), ``act`` from outside. ``ends``:
    with this code, without a restart.
    """

    name: str
    act: Act | None = None
    fault: str = ""
    node: str = ""  # the fault is in every attempt on this node
    ends: int | None = None
    nodes: str = "2"
    restarts: bool = True
    says: str = ""


def kill_rank(run: Run) -> None:
    os.kill(run.cluster.ranks(run.job)[1], signal.SIGKILL)


def stop_rank(run: Run) -> None:
    os.kill(run.cluster.ranks(run.job)[1], signal.SIGSTOP)


def kill_node(run: Run) -> Callable[[], object]:
    run.cluster.kill_node("n2")
    return lambda: run.cluster.start_node("n2")


def fill_disk(run: Run) -> Callable[[], object]:
    filler = run.folder.parent / "filler"
    with open(filler, "wb") as file:
        while room := os.statvfs(filler).f_bavail * os.statvfs(filler).f_frsize:
            os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), room)
    return filler.unlink


def lose_shards(run: Run) -> Callable[[], object]:
    """Cut every shard to nothing under the readers' feet, as a file server does that lost it."""
    kept = {shard: shard.read_bytes() for shard in run.shards.glob("*.tar")}
    for shard in kept:
        os.truncate(shard, 0)
    return lambda: [shard.write_bytes(content) for shard, content in kept.items()]


SCENARIOS = [
    Scenario("kill -9 of one rank", kill_rank, says="killed from outside"),
    Scenario("kill -9 of a node", kill_node),
    Scenario("... and there is no other: min_nodes", kill_node, nodes="1-2"),
    Scenario(
        "exception on one rank", fault="raise", ends=1, says="a defect that shows on one rank"
    ),
    Scenario("exit in the loader's thread", fault="loader exits", ends=1, says="SystemExit"),
    Scenario("a rank stopped (hang)", stop_rank, says="does not answer"),
    Scenario(
        "a rank asleep in its loader (hang)", fault="loader sleeps", says="stands in data of step 6"
    ),
    Scenario(
        "... twice on the same node",
        fault="loader sleeps",
        node="n2",
        says="n2 did so twice and is left out",
    ),
    Scenario("a slow rank", fault="slow", restarts=False, says="rank 1 on n2 is slow"),
    Scenario("a full disk", fill_disk, ends=2, says="o space left"),
    Scenario("a lost shared file", lose_shards, ends=2),
]


def environment(scenario: Scenario, cluster: Cluster) -> dict[str, str]:
    """Return the environment that a run is submitted with: it says what its ranks do to
    themselves.
    """
    return cluster.env | {
        "PYTHONPATH": f"{ROOT}/tests/launch/faults:{ROOT}",
        "STEP_S": str(STEP_S),
        "FAULT": scenario.fault,
        "AT": str(AT),
        "FAULT_NODE": scenario.node,
    }


def submit(
    cluster: Cluster,
    scenario: Scenario,
    *,
    name: str,
    home: Path,
    corpus: Path,
    env: dict[str, str],
) -> Run:
    """Return the run, with AT steps logged."""
    fewest, _, nodes = scenario.nodes.rpartition("-")
    asks = {
        "nodes": int(nodes),
        "gpus_per_node": 1,
        "allow_local_disk": True,
        "min_nodes": int(fewest) if fewest else None,
        "sbatch": {"oversubscribe": True, "mem": 100} | ({"exclude": "n3,n4"} if fewest else {}),
    }
    values = run_values(
        corpus,
        home,
        name,
        cluster=asks,
        checkpoint={"every_steps": SAVE_EVERY},
        model=MODEL,
        train={"steps": STEPS, "global_batch": 16, "micro_batch": 4, "hang_timeout_s": 5},
    )
    file = home / f"{name}.yaml"
    file.write_text(yaml.safe_dump(values))
    said = hfscale("pretrain", file, "--launcher", "slurm", env=env).stdout
    run = Run(cluster, home / name, said.split()[1].rstrip(":"), corpus / "shards" / "train")
    wait_for(
        lambda: len(run.records()) >= AT,
        timeout_s=120,
        every_s=0.05,
        what=lambda: cluster.output(run.job),
    )
    return run


def times(scenario: Scenario, run: Run, *, there: list[int], began: float) -> dict[str, float]:
    """Return the seconds since ``began`` until the processes are gone that were ``there``, and
    until the next attempt has logged a step; only what the scenario lets happen.
    """
    found: dict[str, float] = {}
    if not scenario.restarts:
        return found
    wait_for(lambda: not any(map(alive, there)), timeout_s=180, every_s=0.05, what=run.log)
    found["released_s"] = time.monotonic() - began
    if scenario.ends is None:
        wait_for(
            lambda: run.attempt() > 1,
            timeout_s=240,
            every_s=0.05,
            what=lambda: f"{run.log()}\n{run.cluster.output(run.job)}",
        )
        found["back_s"] = time.monotonic() - began
    return found


def last_job(run: Run) -> tuple[str, str]:
    """Return the job that no other followed, and the state it ended in."""
    while True:
        job = run.newest()
        state = run.cluster.wait(job, timeout_s=300)
        if run.newest() == job:
            return job, state


def lost_steps(run: Run) -> int:
    """Return the most steps that an attempt made and the next one made again."""
    lost = [
        run.steps(attempt)[-1] - run.steps(attempt + 1)[0] + 1
        for attempt in range(1, run.attempt())
    ]
    return max(lost, default=0)


def difference(scenario: Scenario, run: Run) -> float:
    """Return the largest difference to a loss of the undisturbed run, which is the first that is
    asked about.
    """
    told = {record["step"]: record["loss"] for record in run.records()}
    known = last_losses.setdefault("undisturbed", told if scenario.name == "undisturbed" else {})
    return max((abs(told[step] - known[step]) if step in told else 99.0) for step in known)


def play(
    scenario: Scenario, number: int, cluster: Cluster, home: Path, corpus: Path
) -> dict[str, Any]:
    """Return what one scenario gave."""
    env = environment(scenario, cluster)
    run = submit(cluster, scenario, name=f"run-{number}", home=home, corpus=corpus, env=env)
    there, began, mend = list(cluster.processes(run.job)), time.monotonic(), None
    if scenario.act:
        mend = scenario.act(run)
    found: dict[str, Any] = {"name": scenario.name} | times(scenario, run, there=there, began=began)
    job, state = last_job(run)
    if scenario.ends is not None:
        assert cluster.job(job)["ExitCode"] == f"{scenario.ends}:0", (
            scenario.name,
            cluster.job(job),
            run.log(),
        )
    if mend:
        mend()
    if scenario.ends is not None:
        found["ended"] = scenario.ends
        hfscale("pretrain", run.folder, "--launcher", "slurm", env=env | {"FAULT": ""})
        state = cluster.wait(run.newest(), timeout_s=300)
    lost, apart = lost_steps(run), difference(scenario, run)
    on_fewer = "-" in scenario.nodes
    return found | {
        "state": state,
        "lost": lost,
        "restarts": run.attempt() - 1,
        "said": scenario.says in run.log(),
        "apart": apart,
        "recovered": state == "COMPLETED" and apart <= (CLOSE if on_fewer else 0.0),
        "nodes": cluster.job(run.newest())["NodeList"],
    }


last_losses: dict[str, dict[int, float]] = {}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def line_of(one: dict[str, Any]) -> list[object]:
    """Return a scenario's line of the table."""
    seconds = {key: f"{one[key]:.1f}" for key in ("released_s", "back_s") if key in one}
    return [
        one["name"],
        seconds.get("released_s", ""),
        one.get("ended", ""),
        seconds.get("back_s", ""),
        one["lost"],
        one["restarts"],
        one["nodes"],
        yes_or_no(one["said"]),
        f"{one['apart']:.0e}" if one["apart"] else "0",
        yes_or_no(one["recovered"]),
    ]


def yes_or_no(good: bool) -> str:
    """Return the word, in capitals where it is not good."""
    return "yes" if good else "NO"


def report(found: list[dict[str, Any]]) -> str:
    """Return the section of RESULTS.md."""
    slowest = max(one.get("released_s", 0.0) for one in found)
    most = max(one["lost"] for one in found)
    recovered = sum(bool(one["recovered"]) for one in found)
    slurm = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True).stdout.split()[-1]
    return "\n\n".join(
        [
            f"{machine('torch', 'deepspeed')} Slurm {slurm}, "
            "four nodes on this machine, SlurmdTimeout 15 s. Two ranks on two nodes, steps of "
            f"{STEP_S} s, a save every {SAVE_EVERY} steps, "
            "hangs found after 5 s.",
            table(
                [
                    "failure",
                    "released, s",
                    "ended with",
                    "back, s",
                    "steps lost",
                    "restarts",
                    "last on",
                    "said",
                    "apart",
                    "recovered",
                ],
                [line_of(one) for one in found],
            ),
            f"Longest until nothing of the attempt was left: {slowest:.1f} s, "
            f"{verdict(slowest, at_most=LIMIT_S)}. Most steps lost: {most}, "
            f"{verdict(most, at_most=SAVE_EVERY)}. Recovered: {recovered} of {len(found)}, "
            f"{verdict(recovered, at_least=len(found))}. "
            "Those that ended were mended and submitted again by hand; their restart is that one.",
        ]
    )


def main() -> None:
    """Disturb, wait, record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="scenarios whose name has this")
    only = parser.parse_args().only
    if reason := missing():
        sys.exit(reason)
    if not os.environ.get(
        INSIDE
    ):  # a small disk for the runs, which the nodes see, and nobody else
        os.environ[INSIDE] = "1"
        again = [sys.executable, "-m", "benchmarks.chaos_slurm", *sys.argv[1:]]
        os.execvp("unshare", ["unshare", "--mount", "--propagation", "private", *again])
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        corpus, home = make_corpus(Path(folder) / "corpus"), Path(folder) / "runs"
        home.mkdir()
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", home], check=True
        )
        with running() as cluster:
            for number, scenario in enumerate(
                [Scenario("undisturbed", restarts=False), *(s for s in SCENARIOS if only in s.name)]
            ):
                found.append(play(scenario, number, cluster, home, corpus))
                print(found[-1], file=sys.stderr, flush=True)
        subprocess.run(["umount", "-l", home], check=True)
    if only:
        print(report(found[1:]))
    else:
        record("chaos_slurm", report(found[1:]))


if __name__ == "__main__":
    main()
