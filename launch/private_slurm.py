"""A Slurm of this machine alone, for a while: munged, slurmctld, and a slurmd for each node.

    with running(Machines(("n1", "n2"), cpus=2, memory_mb=4000)) as slurm:
        subprocess.run(["sinfo"], env=slurm.env)

`hfscale rehearse --private-slurm` runs a job's own script on it where no cluster is near, and the
tests run on one with more nodes (``tests/helpers/slurm.py``). Root can give each node a host name
of its own (``unshare``); whoever cannot has one node, which is this machine.

A reaper process ends everything when its pipe closes: at the end, after Ctrl-C, and when whoever
started it is killed.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from hfscale.errors import ConfigError
from launch.interpreter import python

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
PACKAGES = "munge slurm-client slurmctld slurmd"  # of Debian and Ubuntu
SBIN = "/usr/sbin:/sbin"  # where daemons lie, which a user's PATH may lack
PLUGINS = ("*/slurm-wlm", "*/slurm")  # below /usr/lib: without PluginDir some builds find none
START_S, POLL_S = 60.0, 0.02
REAP_S = 30.0
CONFIG = """\
ClusterName=hfscale
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
PlugStackConfig={folder}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SlurmdTimeout=15
KillWait=20
MinJobAge=3600
FirstJobId={first_job}
"""


@dataclass(frozen=True)
class Machines:
    """What a private Slurm is made of."""

    nodes: tuple[str, ...]  # host names; of one node alone it may be this machine's
    cpus: int  # of a node: counted, not bound
    memory_mb: int
    gpus: int = 0
    partitions: str = "PartitionName=private Nodes=ALL Default=YES MaxTime=60 DefaultTime=10"


def missing() -> list[str]:
    """Return the programs that are not here."""
    path = f"{os.environ.get('PATH', '')}:{SBIN}"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


def refuse_missing() -> None:
    """Return if all programs of a Slurm are here.

    Raises:
        ConfigError: naming those that are not.
    """
    if absent := missing():
        raise ConfigError(
            "a private Slurm takes programs that are not on this machine",
            where="--private-slurm",
            value=", ".join(absent),
            remedy=f"as root: apt-get install -y --no-install-recommends {PACKAGES}; or rehearse "
            "without Slurm: --launcher local",
        )


def can_name_nodes() -> bool:
    """Return whether nodes can have host names of their own: for root, where that is allowed."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    tried = ["unshare", "--mount", "--uts", "true"]
    return subprocess.run(tried, capture_output=True, check=False).returncode == 0


def this_host() -> str:
    """Return the name of this machine, as Slurm has it."""
    return socket.gethostname().split(".")[0]


class PrivateSlurm:
    """A running Slurm; every client must be started with ``env``."""

    def __init__(self, machines: Machines) -> None:
        # short: a socket's path has at most 107 characters
        self.folder = Path(tempfile.mkdtemp(prefix="hfslurm-"))
        self.machines = machines
        foreign = ("SLURM_", "SBATCH_", "SRUN_")
        kept = {name: word for name, word in os.environ.items() if not name.startswith(foreign)}
        self.env = kept | {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:{SBIN}",
        }
        self._reaper = subprocess.Popen(
            python("launch.private_slurm", self.folder),
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            self._configure()
            self._start()
        except BaseException:
            self.stop()
            raise

    # ---------------------------------------------------------------------------- what others say
    def more(self) -> str:
        """Return more lines of slurm.conf."""
        return ""

    def devices(self, number: int) -> Sequence[str]:
        """Return the files of the GPUs of a node, by its number: each GPU is of one node."""
        gpus = self.machines.gpus
        return [f"/dev/nvidia{gpu}" for gpu in range(number * gpus, (number + 1) * gpus)]

    # ------------------------------------------------------------------------------------- its life
    def _configure(self) -> None:
        at, nodes = self.folder, self.machines.nodes
        for name in ("state", *(f"spool-{node}" for node in nodes)):
            (at / name).mkdir()
        at.chmod(0o755)  # munge looks at it
        key = at / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        (at / "plugstack.conf").touch()
        ports = _free_ports(len(nodes) + 1)
        host = this_host()
        own = nodes == (host,)
        addresses = ["127.0.0.1"] if own else [f"127.0.1.{n}" for n in range(1, len(nodes) + 1)]
        hosts = {"localhost": "127.0.0.1", host: "127.0.0.1", **dict(zip(nodes, addresses))}
        (at / "hosts").write_text("".join(f"{to} {name}\n" for name, to in hosts.items()))
        lines = [
            CONFIG.format(
                folder=at,
                host=host,
                port=ports[0],
                user=_user(),
                # job ids name ports of the rendezvous, and all clusters share this machine's
                first_job=100 * (ports[0] % 10_000) + 1,
            ),
            *(f"PluginDir={place}" for place in _plugins()),
            self.more(),
            *self._nodes(addresses, ports[1:]),
            self.machines.partitions,
        ]
        (at / "slurm.conf").write_text("\n".join([*filter(None, lines), ""]))

    def _nodes(self, addresses: Sequence[str], ports: Sequence[int]) -> Iterator[str]:
        """Yield the lines of the nodes, after writing which GPUs are whose."""
        machines = self.machines
        each = f"CPUs={machines.cpus} RealMemory={machines.memory_mb} State=UNKNOWN"
        if machines.gpus:
            each += f" Gres=gpu:{machines.gpus}"
            yield "GresTypes=gpu"
        yield f"NodeName=DEFAULT {each}"
        gres = []
        for number, node in enumerate(machines.nodes):
            place = f"NodeAddr={addresses[number]} Port={ports[number]}"
            yield f"NodeName={node} NodeHostname={node} {place}"
            files = self.devices(number) if machines.gpus else []
            gres += [f"NodeName={node} Name=gpu File={file}" for file in files]
        (self.folder / "gres.conf").write_text("\n".join([*gres, ""]))

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
        self._await((at / "munge.socket").exists)
        self.start_controller("-c")
        for node in self.machines.nodes:
            self.start_node(node)
        self._await(self._all_idle)

    def start_controller(self, *options: str) -> None:
        """Start slurmctld."""
        self._spawn("slurmctld", ["slurmctld", "-D", *options, "-f", f"{self.folder}/slurm.conf"])

    def start_node(self, node: str) -> None:
        """Start the slurmd of a node, under its own host name where that is another one."""
        slurmd = ["slurmd", "-D", "-N", node, "-f", f"{self.folder}/slurm.conf"]
        if node == this_host():
            self._spawn(node, slurmd)
            return
        inside = (
            f"hostname {node} && mount --bind {self.folder}/hosts /etc/hosts && exec "
            f"{' '.join(slurmd)}"
        )
        self._spawn(node, ["unshare", "--mount", "--uts", "sh", "-c", inside])

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

    def _all_idle(self) -> bool:
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"],
            env=self.env,
            capture_output=True,
            text=True,
            timeout=START_S,
            check=False,
        )
        return set(done.stdout.split()) == set(self.machines.nodes)

    def _await(self, condition: Callable[[], bool]) -> None:
        until = time.monotonic() + START_S
        while not condition():
            if time.monotonic() > until:
                raise ConfigError(
                    "a private Slurm does not come up on this machine",
                    where="--private-slurm",
                    value=self.logs(),
                    remedy="rehearse without Slurm: --launcher local",
                )
            time.sleep(POLL_S)

    def logs(self) -> str:
        """Return the last lines of every daemon, for a failed start."""
        files = [one for one in self.folder.iterdir() if one.suffix in (".log", ".out")]
        texts = [f"--- {file.name}\n{_end_of(file)}" for file in sorted(files)]
        return "\n".join(texts)

    def stop(self) -> None:
        """End every process of it, jobs and all, and remove its folder."""
        assert self._reaper.stdin is not None
        self._reaper.stdin.close()
        self._reaper.wait(2 * REAP_S)


@contextmanager
def running(machines: Machines) -> Iterator[PrivateSlurm]:
    """Yield a Slurm of its own, and end it.

    Raises:
        ConfigError: if it does not come up.
    """
    slurm = PrivateSlurm(machines)
    try:
        yield slurm
    finally:
        slurm.stop()


def _end_of(file: Path) -> str:
    return file.read_text(errors="replace")[-1500:]


def _user() -> str:
    """Return who the daemons and jobs belong to: whoever runs this."""
    with suppress(KeyError):
        return pwd.getpwuid(os.geteuid()).pw_name
    return str(os.geteuid())


def _plugins() -> list[Path]:
    """Return where the plugins of Slurm lie, as far as that must be said."""
    there = [place for glob in PLUGINS for place in Path("/usr/lib").glob(glob)]
    return there[:1]


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


# ------------------------------------------------------------------------------------------- reaper
def processes_of(folder: Path) -> list[int]:
    """Return every process that was started with this Slurm's configuration: daemons, job steps and
    what they started.
    """
    mark = f"SLURM_CONF={folder}/slurm.conf".encode()
    pids = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with suppress(OSError):
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                pids.append(int(entry.name))
    return pids


def _reap(folder: Path) -> None:
    """Wait for the pipe to close, then kill all there is of the Slurm in ``folder`` and remove
    it.
    """
    sys.stdin.buffer.read()
    until = time.monotonic() + REAP_S
    while (pids := processes_of(folder)) and time.monotonic() < until:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _reap(Path(sys.argv[1]))
