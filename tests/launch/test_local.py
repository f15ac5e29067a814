"""Real processes under the local launcher: their logs, their failures, requests to stop, and what
is left when it dies.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from hfscale.monitor import fence
from launch import local, slurm
from launch.job import Training, show_curves
from launch.request import Request
from tests.helpers.cli import ROOT
from tests.helpers.corpus import run_values

DRIVER = """
import sys
from hfscale import log
from launch import local
from launch.job import Training
from launch.request import Request
from hfscale.errors import UserError
log.setup()
local.GRACE_S = float(sys.argv[2])
try:
    request = Request("config.yaml", worker="tests.launch.acting_rank", procs=int(sys.argv[1]))
    code = local.launch(Training(request))
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    code = 2
sys.exit(code)
"""


def start(folder: Path, act: str, *, procs: int = 2, grace_s: float = 0.3) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "ACT": act, "CUDA_VISIBLE_DEVICES": ""}
    env.pop("OMP_NUM_THREADS", None)
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(procs), str(grace_s)],
        cwd=folder,
        env=env,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(launcher: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = launcher.communicate(timeout=120)  # imports alone take long on a busy machine
    return launcher.returncode, out, err


def log(folder: Path, rank: int) -> str:
    path = folder / f"runs/first/logs/rank-{rank}.log"
    return path.read_text() if path.exists() else ""


def wait_for(condition: object, *, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def pids(folder: Path, procs: int = 2) -> list[int]:
    return [
        int(pid) for rank in range(procs) for pid in re.findall(r"has pid (\d+)", log(folder, rank))
    ]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_logs_and_console(folder: Path):
    code, out, err = finish(start(folder, "fine"))
    assert code == 0, err
    assert "rank 0 of 2" in out
    assert "rank 0 complains" in err
    assert "rank 1" not in out + err
    assert "rank 0 of 2" in log(folder, 0)
    assert "rank 0 complains" in log(folder, 0)
    assert "rank 1 of 2" in log(folder, 1)
    assert "rank 1 complains" in log(folder, 1)
    assert f"and {max(1, len(os.sched_getaffinity(0)) // 2)} threads" in out, "cores are shared out"
    curves = f"first:{folder / 'runs/first/tensorboard'}"
    assert f"tensorboard --logdir_spec {curves}" in err, "under the run's own name"
    finish(start(folder, "fine"))
    assert log(folder, 0).count("rank 0 of 2") == 2, "a rerun appends"


def test_one_rank_fails_and_takes_the_others_with_it(folder: Path):
    began = time.monotonic()
    code, _, err = finish(start(folder, "one fails"))
    assert code == 3
    assert time.monotonic() - began < 15, "the other one sleeps for a minute"
    assert "rank 1 ended with exit code 3" in err
    assert "rank 1 says why" in err, "the tail of the log of the rank that failed"
    assert not any(alive(pid) for pid in pids(folder))


def test_a_killed_rank_is_named_with_its_signal(folder: Path):
    code, _, err = finish(start(folder, "one is killed"))
    assert code == 137
    assert "rank 1 was killed by SIGKILL" in err


def test_a_user_error_on_all_ranks_is_said_once(folder: Path):
    code, _, err = finish(start(folder, "user error"))
    assert code == 2
    assert err.count("error: the same on every rank") == 1
    assert "rank 1" not in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop_reaches_every_rank_once(folder: Path, number: int):
    launcher = start(folder, "listens", grace_s=10)
    wait_for(lambda: all("listening" in log(folder, rank) for rank in (0, 1)))
    launcher.send_signal(number)
    code, _, err = finish(launcher)
    assert code == 75
    assert all("stopped after 1 request" in log(folder, rank) for rank in (0, 1))
    assert f"hfscale pretrain {folder / 'runs/first'}" in err


def test_a_second_ctrl_c_kills(folder: Path):
    launcher = start(folder, "deaf")
    wait_for(lambda: all("listening" in log(folder, rank) for rank in (0, 1)))
    launcher.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert launcher.poll() is None, "deaf ranks go on after the first"
    launcher.send_signal(signal.SIGINT)
    assert finish(launcher)[0] == 137
    assert not any(alive(pid) for pid in pids(folder))


def test_ranks_die_with_a_killed_launcher(folder: Path):
    launcher = start(folder, "deaf")
    wait_for(lambda: len(pids(folder)) == 2)
    launcher.kill()
    finish(launcher)
    wait_for(lambda: not any(alive(pid) for pid in pids(folder)))


def test_a_second_launcher_is_refused_and_told_who_is_there(folder: Path):
    first = start(folder, "listens")
    wait_for(lambda: len(pids(folder)) == 2)
    code, _, err = finish(start(folder, "fine"))
    assert code == 2
    assert f"process {first.pid} on {socket.gethostname()}" in err
    wait_for(lambda: "listening" in log(folder, 0))
    first.terminate()
    assert finish(first)[0] == 75
    assert finish(start(folder, "fine"))[0] == 0, "the lock ends with its holder"


@pytest.mark.slow
def test_an_attempt_that_is_superseded_leaves_at_once_and_writes_no_more(
    corpus: Path, tmp_path: Path
):
    """As a node that Slurm has lost: the younger attempt has begun elsewhere, and no lock reaches
    this one.
    """
    values = run_values(
        corpus,
        tmp_path / "runs",
        "run",
        train={"steps": 100_000, "global_batch": 4, "micro_batch": 2, "hang_timeout_s": None},
        checkpoint={"every_steps": 1, "every_minutes": None},
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    launcher = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "pretrain", "config.yaml", "--procs", "2"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    run = tmp_path / "runs" / "run"
    wait_for(lambda: any((run / "checkpoints").glob("step-????????")), timeout_s=120)
    younger = fence.take(run, job="8")
    records = (run / "metrics.jsonl").read_bytes()
    saved = sorted(path.name for path in (run / "checkpoints").glob("step-????????"))
    out, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 77, out
    assert f"attempt 1 of this run is superseded by attempt {younger.number}" in out
    assert (run / "metrics.jsonl").read_bytes() == records
    assert sorted(path.name for path in (run / "checkpoints").glob("step-????????")) == saved
    assert fence.Fence(run, 1).ended() == 77


def test_ranks_beside_an_allocation_are_told(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """`salloc`, then `hfscale pretrain` without a launcher: the ranks would run on the login
    node.
    """
    assert local.unused_allocation() == []
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    [notice] = local.unused_allocation()
    assert "this machine, which is none of its nodes" in notice and "--launcher slurm" in notice
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    assert local.unused_allocation() == []
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    assert "one of the 2 nodes" in local.unused_allocation()[0]


def test_what_is_printed_can_be_copied(folder: Path):
    job = Training(Request("config.yaml", ("run.root=my lab",)))
    assert f"hfscale logs '{job.folder}' -f" in slurm.followed("7", job, log="")
    assert local.tensorboard_line(job.curves).endswith(
        f"_spec '{job.name}:{job.folder}/tensorboard'"
    )
    assert show_curves(Path("/a,b"), name="run").endswith("--logdir /a,b"), "TensorBoard cuts there"


@pytest.mark.parametrize(
    ("limit", "says"),
    [
        ("ulimit -n 64", "open files: at most 64; needed: 4,096"),
        ("ulimit -f 1000", "file size: at most 0.00102 GB; needed: 1 (logs"),
        ("export OMP_NUM_THREADS=x", "threads: OMP_NUM_THREADS is x"),
    ],
)
def test_limits_of_a_process_are_refused_by_name(folder: Path, limit: str, says: str):
    command = f"{limit}; exec {sys.executable} -m launch.cli pretrain config.yaml --dry-run"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert says in done.stderr and "in slurm/site.sh or your shell" in done.stderr
