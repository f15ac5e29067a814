"""A real Slurm cluster on this machine: munged, slurmctld and four slurmd nodes with host names and
fake GPUs of their own.

    def test_a_job(cluster):  # a session fixture: one cluster a pytest worker, started in a second
        job = cluster.sbatch("--nodes=2", script)
        cluster.wait(job)

Three partitions, ``low`` < ``normal`` < ``high``: a job in a higher one preempts those below it.
Needs root (host names are made with ``unshare``) and the packages of ``tests/apt-packages.txt``. A
reaper process ends everything when its pipe closes: at the end of the session, after Ctrl-C, and
when pytest is killed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# CPUs are only counted, not bound: every machine can run every test
NODES, GPUS, CPUS = (
    ("n1", "n2", "n3", "n4"),
    2,
    8,
)
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare")
ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "BOOT_FAIL",
)
CONFIG = """\
ClusterName=hfscale
SlurmctldHost={host}
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
PluginDir={plugins}
PlugStackConfig={folder}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SlurmdTimeout=15
KillWait=20
MinJobAge=3600
FirstJobId={first_job}
GresTypes=gpu
JobSubmitPlugins=lua
NodeName=DEFAULT CPUs={cpus} RealMemory=4000 Gres=gpu:{gpus} State=UNKNOWN
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=60 DefaultTime=10 PriorityTier=1 GraceTime=30
PartitionName=normal Nodes=ALL MaxTime=60 DefaultTime=10 PriorityTier=10 GraceTime=30
PartitionName=high Nodes=ALL MaxTime=60 DefaultTime=10 PriorityTier=100 PreemptMode=OFF
"""


NO_ACCOUNT = """\
function slurm_job_submit(job, partitions, uid)  -- refusing accounts takes a data base, or this
    if job.account == "overdrawn" then return 2045 end  -- ESLURM_INVALID_ACCOUNT
    return slurm.SUCCESS
end
function slurm_job_modify(job, record, partitions, uid) return slurm.SUCCESS end
return slurm.SUCCESS
"""


def missing() -> str | None:
    """Return why no cluster can run here, or None."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    if absent := [name for name in PROGRAMS if shutil.which(name, path=path) is None]:
        return f"no {', '.join(absent)}: apt-get install the packages of tests/apt-packages.txt"
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["unshare", "--mount", "--uts", "true"], capture_output=True, check=False
        ).returncode
    ):
        return "a test cluster needs root: its nodes have host names of their own"
    return None


class Cluster:
    """A running cluster; every client must be started with ``env``."""

    def __init__(self) -> None:
        # short: a socket's path has at most 107 characters
        self.folder = Path(tempfile.mkdtemp(prefix="hfslurm-"))
        self.env = os.environ | {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        }
        self.env = {
            name: value
            for name, value in self.env.items()
            if not name.startswith(("SLURM_", "SBATCH_", "SRUN_")) or name == "SLURM_CONF"
        }
        self._reaper = subprocess.Popen(
            [sys.executable, __file__, str(self.folder)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            self._configure()
            self._start()
        except BaseException:
            self.stop()
            raise

    def _configure(self) -> None:
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        self.folder.chmod(0o755)  # munge looks at it
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        (self.folder / "plugstack.conf").touch()
        (self.folder / "job_submit.lua").write_text(NO_ACCOUNT)
        ports = _free_ports(len(NODES) + 1)
        addresses = {node: f"127.0.1.{number}" for number, node in enumerate(NODES, 1)}
        host = socket.gethostname().split(".")[0]
        (self.folder / "hosts").write_text(
            "".join(
                f"{address} {name}\n"
                for name, address in {
                    "localhost": "127.0.0.1",
                    host: "127.0.0.1",
                    **addresses,
                }.items()
            )
        )
        nodes = [
            f"NodeName={node} NodeHostname={node} NodeAddr={address} Port={port}"
            for (node, address), port in zip(addresses.items(), ports[1:], strict=True)
        ]
        plugins = next(Path("/usr/lib").glob("*/slurm-wlm"))
        # job ids name ports of the rendezvous, and the nodes of all clusters share this machine's
        (self.folder / "slurm.conf").write_text(
            CONFIG.format(
                folder=self.folder,
                host=f"{host}(127.0.0.1)",
                port=ports[0],
                plugins=plugins,
                cpus=CPUS,
                gpus=GPUS,
                nodes="\n".join(nodes),
                first_job=100 * (ports[0] % 10_000) + 1,
            )
        )
        for gpu in range(GPUS):
            subprocess.run(["mknod", self.folder / f"gpu{gpu}", "c", "1", "3"], check=True)
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-{GPUS - 1}]\n")

    def _start(self) -> None:
        at = self.folder
        self._spawn(
            "munged",
            [
                "munged",
                "--foreground",
                "--force",
                f"--key-file={at}/munge.key",
                f"--socket={at}/munge.socket",
                f"--pid-file={at}/munge.pid",
                f"--log-file={at}/munge.log",
                f"--seed-file={at}/munge.seed",
            ],
        )
        wait_for((at / "munge.socket").exists)
        self.start_controller("-c")
        for node in NODES:
            self.start_node(node)
        idle = ["sinfo", "-h", "-t", "idle", "-o", "%D", "-p", "low"]
        wait_for(
            lambda: self.run(*idle, check=False).strip() == str(len(NODES)),
            what=lambda: "the nodes did not come up\n" + self.logs(),
        )

    def start_controller(self, *options: str) -> None:
        self._spawn("slurmctld", ["slurmctld", "-D", *options, "-f", f"{self.folder}/slurm.conf"])

    def stop_controller(self) -> None:
        """End slurmctld alone, in order: jobs go on, and nobody answers."""
        [pid] = [pid for pid in processes_of(self.folder) if _command(pid)[0] == "slurmctld"]
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda: _command(pid)[0] != "slurmctld")

    def start_node(self, node: str) -> None:
        inside = (
            f"hostname {node} && mount --bind {self.folder}/hosts /etc/hosts && exec "
            f"slurmd -D -N {node} -f {self.folder}/slurm.conf"
        )
        self._spawn(node, ["unshare", "--mount", "--uts", "sh", "-c", inside])

    def kill_node(self, node: str) -> None:
        """Kill -9 everything that runs on a node, its slurmd first: what a power failure leaves."""
        pids = [
            pid
            for pid in processes_of(self.folder)
            if _command(pid)[:4] == ["slurmd", "-D", "-N", node]
        ]
        there = os.readlink(f"/proc/{pids[0]}/ns/uts")  # the host name is the node's
        for pid in pids + processes_of(self.folder):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/ns/uts") == there:
                    os.kill(pid, signal.SIGKILL)

    def _spawn(self, name: str, command: list[str]) -> None:
        with open(self.folder / f"{name}.out", "ab") as out:
            subprocess.Popen(
                command,
                env=self.env,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def stop(self) -> None:
        """End every process of the cluster, jobs and all, and remove its folder."""
        assert self._reaper.stdin is not None
        self._reaper.stdin.close()
        self._reaper.wait(60)

    # -------------------------------------------------------------------------------------- clients
    def run(
        self, *command: object, check: bool = True, timeout_s: float = 60.0, **options: Any
    ) -> str:
        """Return what a client prints (stdout and stderr)."""
        done = subprocess.run(
            [*map(str, command)],
            env=options.pop("env", self.env),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            check=False,
            stdin=subprocess.DEVNULL,
            **options,
        )
        assert done.returncode == 0 or not check, f"{' '.join(map(str, command))}: {done.stdout}"
        return done.stdout

    def sbatch(self, *arguments: object, **options: Any) -> str:
        """Return the id of the job that was submitted."""
        return self.run("sbatch", "--parsable", *arguments, **options).strip().splitlines()[-1]

    def job(self, job: str) -> dict[str, str]:
        """Return what ``scontrol show job`` says, by name."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", job)))

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def wait(self, job: str, states: tuple[str, ...] = ENDED, *, timeout_s: float = 300.0) -> str:
        """Return the state of a job once it is one of ``states``."""
        wait_for(
            lambda: self.state(job) in states,
            timeout_s=timeout_s,
            every_s=0.3,
            what=lambda: (
                f"job {job} is not {' or '.join(states)}: {self.job(job)}\n{self.output(job)}"
            ),
        )
        return self.state(job)

    def ranks(self, job: str) -> dict[int, int]:
        """Return rank -> process of the Python processes of a job's step."""
        return {
            int(env["SLURM_PROCID"]): pid
            for pid, env in self.processes(job).items()
            if "SLURM_STEP_NUM_TASKS" in env and "python" in Path(_command(pid)[0]).name
        }

    def processes(self, job: str) -> dict[int, dict[str, str]]:
        """Return process -> environment of what runs for a job: its ranks, its script, and whatever
        they started.
        """
        found = {}
        for pid in processes_of(self.folder):
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{pid}/environ").read_text(errors="replace")
                env = dict(pair.partition("=")[::2] for pair in text.split("\0"))
                if env.get("SLURM_JOB_ID") == job and not _command(pid)[0].startswith("slurmstepd"):
                    found[pid] = env
        return found

    def output(self, job: str) -> str:
        """Return what the job has printed so far."""
        file = Path(self.job(job).get("StdOut", ""))
        return file.read_text(errors="replace") if file.is_file() else ""

    def logs(self) -> str:
        """Return the last lines of every daemon, for a failed start."""
        return "\n".join(
            f"--- {file.name}\n{file.read_text(errors='replace')[-1500:]}"
            for file in sorted(self.folder.iterdir())
            if file.suffix in (".log", ".out")
        )


@contextlib.contextmanager
def running() -> Iterator[Cluster]:
    """Yield a cluster, and end it."""
    cluster = Cluster()
    try:
        yield cluster
    finally:
        cluster.stop()


def wait_for(
    condition: Callable[[], object],
    *,
    timeout_s: float = 180.0,
    every_s: float = 0.02,
    what: Callable[[], str] = lambda: "it did not happen",
) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(every_s)


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _command(pid: int) -> list[str]:
    """Return the words of a process's command; one empty word if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return [""]


def processes_of(folder: Path) -> list[int]:
    """Return every process that was started with this cluster's configuration: daemons, job steps
    and what they started.
    """
    mark, found = f"SLURM_CONF={folder}/slurm.conf".encode(), []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if (
                entry.name.isdigit()
                and int(entry.name) != os.getpid()
                and mark in (entry / "environ").read_bytes().split(b"\0")
            ):
                found.append(int(entry.name))
    return found


def reap(folder: Path) -> None:
    """Wait for the pipe to close, then kill all there is of the cluster in ``folder`` and remove
    it.
    """
    sys.stdin.buffer.read()
    for _ in range(1500):
        pids = processes_of(folder)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not pids:
            break
        time.sleep(0.02)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    reap(Path(sys.argv[1]))
