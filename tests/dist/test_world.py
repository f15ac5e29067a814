"""A rank finds its place from torchrun's or Slurm's variables, and says so when they name none."""

import socket
from pathlib import Path

import pytest

from hfscale.dist.world import Allocation, Place, World, allocation, copies, counts, free_port
from hfscale.errors import ConfigError


def test_a_bare_process_is_a_world_of_one():
    assert World.from_environment({}) == World()


def test_torchruns_variables():
    env = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "node7",
        "MASTER_PORT": "2950",
    }
    world = World.from_environment(env)
    assert world == World(Place(3, 4), 1, 2, "node7", 2950)
    assert World.from_environment(world.export()) == world


def test_slurms_variables_count_only_for_more_than_one_task():
    slurm = {
        "SLURM_PROCID": "5",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_NTASKS_PER_NODE": "4",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": "29500",
    }
    assert World.from_environment(slurm) == World(Place(5, 8), 1, 4, "n1", 29500)
    uneven = slurm | {"SLURM_STEP_TASKS_PER_NODE": "2(x2),4", "SLURM_NODEID": "2"}
    assert World.from_environment(uneven).local_ranks == 4
    assert World.from_environment(uneven | {"SLURM_NODEID": "1"}).local_ranks == 2, (
        "whatever SLURM_NTASKS_PER_NODE an outer allocation has handed on"
    )
    assert World.from_environment({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) == World(), (
        "a batch script, which is no rank"
    )
    assert World.from_environment({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) == World(), (
        "a shell inside an allocation"
    )


def test_the_allocation():
    assert allocation({"PATH": "/bin"}) is None
    env = {
        "SLURM_JOB_ID": "12",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_RESTART_COUNT": "3",
    }
    assert allocation(env) == Allocation(
        "12", "n[1-2]", nodes=2, gpus_per_node=8, tasks_per_node=8, restarts=3, rank=0, array_id="_"
    )
    shell = allocation(
        {"SLURM_JOB_ID": "12", "SLURM_GPUS_PER_NODE": "a100:4", "SLURM_NTASKS_PER_NODE": "2"}
    )
    assert shell is not None
    assert (shell.gpus_per_node, shell.tasks_per_node) == (4, 2), "in a shell of salloc"
    whole = allocation(env | {"SLURM_GPUS_PER_NODE": "1", "SLURM_JOB_CPUS_PER_NODE": "4(x2),2"})
    assert whole is not None
    assert whole.gpus_per_node == 1, "what was asked for, not what a whole node has"
    assert whole.cpus_per_node == 2, "of the node that has fewest"


def test_how_often_srun_started_a_command():
    assert copies({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}) == 2
    assert copies({"SLURM_STEP_NUM_TASKS": "2"}) == 1, "handed on to a job that was submitted there"
    assert counts("2(x3),1") == [2, 2, 2, 1]


@pytest.mark.parametrize(
    "env", [{"RANK": "4", "WORLD_SIZE": "4", "MASTER_PORT": "1"}, {"RANK": "0", "WORLD_SIZE": "2"}]
)
def test_an_impossible_place_is_refused(env):
    with pytest.raises(ConfigError, match="no place in the world"):
        World.from_environment(env)


def test_a_port_that_nobody_is_given_meanwhile():
    given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    port = free_port()
    assert port < max(given, 30_000)
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(OSError, match="in use"):
            free_port(port)
        assert free_port() != port
