"""What the findings of all ranks come to: one line where they agree, and the nodes that stand
out.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from hfscale.checks.finding import Finding, failed
from hfscale.checks.judge import bad_nodes, judge, table
from hfscale.checks.needs import Needs
from hfscale.errors import ConfigError

NODES = ("n1", "n2", "n3", "n4")
RATE = Finding("matrix products", "ok", "", unit="TFLOP/s", slow=(0.9, 0.75))


def rates(*values: float) -> list[Finding]:
    return [
        replace(RATE, value=value, nodes=(node,)) for node, value in zip(NODES, values, strict=True)
    ]


def test_ranks_that_agree_are_one_line():
    [one] = judge(rates(610.4, 612.0, 599.7, 640.0), nodes=NODES)
    assert (one.state, one.said, one.nodes, one.remedy) == ("ok", "600 to 640 TFLOP/s", (), "")
    assert one.value == 599.7


@pytest.mark.parametrize(
    ("slowest", "state", "bad"), [(95.0, "ok", []), (80.0, "warn", []), (50.0, "fail", ["n3"])]
)
def test_a_slow_rank_is_named(slowest: float, state: str, bad: list[str]):
    findings = judge(rates(100.0, 101.0, slowest, 99.0), nodes=NODES)
    worst = findings[-1]
    assert worst.state == state
    assert bad_nodes(findings) == bad
    if state != "ok":
        assert worst.nodes == ("n3",)
        assert f"{slowest:.3g} (median of all ranks: 100) TFLOP/s" in worst.said
        assert "nvidia-smi" in worst.remedy


def test_of_two_nodes_the_slower_one_is_the_bad_one():
    pair = [
        replace(RATE, value=value, nodes=(node,)) for node, value in (("n1", 50.0), ("n2", 100.0))
    ]
    assert bad_nodes(judge(pair, nodes=("n1", "n2"))) == ["n1"]


def test_what_all_nodes_fail_is_no_nodes_fault():
    everywhere = [Finding("writing", "fail", "full", nodes=(node,)) for node in NODES]
    [one] = judge(everywhere, nodes=NODES)
    assert (one.state, one.nodes) == ("fail", ())
    assert bad_nodes([one]) == []
    assert bad_nodes(judge(everywhere[:2], nodes=NODES)) == ["n1", "n2"]


def test_nodes_that_differ_are_a_warning():
    versions = [
        Finding("packages", "ok", "torch 2.13" if node != "n2" else "torch 2.12", nodes=(node,))
        for node in NODES
    ]
    same, other = judge(versions, nodes=NODES)
    assert (same.state, same.nodes) == ("ok", ("n1", "n3", "n4"))
    assert (other.state, other.nodes, other.said) == (
        "warn",
        ("n2",),
        "torch 2.12; most nodes: torch 2.13",
    )


def test_an_error_keeps_its_own_remedy():
    error = ConfigError("no such thing", where="a.b", value=3, remedy="say 4")
    [mine, theirs] = judge(
        [failed("config", error), failed("writing", OSError(28, "No space left"))], nodes=["here"]
    )
    assert (mine.said, mine.remedy) == ("no such thing: a.b: 3", "say 4")
    assert theirs.said == "OSError: [Errno 28] No space left"
    assert "run.root" in theirs.remedy


def test_the_table_has_a_remedy_below_what_is_wrong():
    found = [
        Finding("GPU", "ok", "8 x H100", nodes=("n1",)),
        Finding("clocks", "warn", "3 s apart", nodes=("n2",)),
    ]
    findings = judge(found, nodes=("n1", "n2"))
    assert table(findings).splitlines()[0] == "ok    GPU     n1: 8 x H100"
    assert table(findings).splitlines()[1:] == [
        "warn  clocks  n2: 3 s apart",
        f"{'':14}-> {findings[1].remedy}",
    ]
    assert "NTP" in findings[1].remedy


def test_the_range_of_what_is_ok_leaves_the_bad_nodes_out():
    def node(name: str, free: float) -> Finding:
        state = "fail" if free < 1 else "ok"
        said = f"{free:.3g} GB"
        return Finding("free space", state, said, nodes=(name,), value=free, unit="GB")

    nodes = ["n1", "n2", "n3"]
    found = judge([node("n1", 60.0), node("n2", 70.0), node("n3", 0.001)], nodes=nodes)
    assert [(one.state, one.nodes, one.said) for one in found] == [
        ("ok", ("n1", "n2"), "60 to 70 GB"),
        ("fail", ("n3",), "0.001 GB"),
    ]


# ------------------------------------------------------------------------------- what a run needs
GPT2 = Needs(
    ranks=4,
    nodes=4,
    parameters=124_000_000,
    trained=124_000_000,
    signal_s=300,
    flops_per_token=0.86e9,
    bytes_per_token=2.0,
    rank_flops=1e12,
    step_tokens=512 * 1024,
)


def reading(*values: float) -> list[Finding]:
    unit = "MB/s a rank"
    pairs = zip(NODES, values, strict=True)
    return [
        Finding("reading", "ok", "", nodes=(node,), value=value, unit=unit, slow=(0.3, 0.0))
        for node, value in pairs
    ]


def test_what_is_enough_for_the_run_is_ok_and_says_so():
    """20 MB/s is little for a disk; tokens of a GPT-2 are 2 bytes, and come at 600 a second."""
    [one] = judge(reading(20.0, 20.0, 20.0, 20.0), nodes=NODES, needs=GPT2)
    assert one.state == "ok"
    assert one.needs == "0.00116 (581 tokens/s of 2 bytes (50% of the matrix products, at most))"
    assert "20 MB/s a rank; enough: needs 0.00116 (581 tokens/s" in table([one])
    assert judge(reading(20.0, 20.0, 20.0, 2.0), nodes=NODES, needs=GPT2)[0].state == "ok"


def test_shards_that_all_ranks_read_too_slowly_are_to_be_copied():
    fast = replace(GPT2, rank_flops=0.0, tokens_per_s=40e6)
    [one] = judge(reading(12.0, 12.0, 11.0, 12.0), nodes=NODES, needs=fast)
    assert (one.state, one.nodes) == ("warn", ())
    assert "copy the shards" in one.remedy
    assert one.needs == "20 (10,000,000 tokens/s of 2 bytes (as this run logged it))"


@pytest.mark.parametrize("needs", [Needs(), replace(GPT2, rank_flops=0.0, tokens_per_s=40e6)])
def test_a_straggler_is_not_told_to_copy_shards(needs: Needs):
    """The file system does well for the others: the node is to be looked at."""
    *_, one = judge(reading(100.0, 100.0, 11.0, 100.0), nodes=NODES, needs=needs)
    assert (one.state, one.nodes) == ("warn", ("n3",))
    assert "shards" not in one.remedy
    assert "leave the node out" in one.remedy


def test_a_save_that_is_not_done_in_time():
    slow = [Finding("writing", "ok", "", nodes=(n,), value=1.0, unit="MB/s") for n in NODES]
    [one] = judge(slow, nodes=NODES, needs=GPT2)
    assert one.state == "warn"
    assert one.needs == "1.24 (0.372 GB of a checkpoint in the 300 s of cluster.signal_s)"
    assert "cluster.signal_s" in one.remedy


@pytest.mark.parametrize(("free", "state"), [(100.0, "ok"), (3.0, "warn"), (2.0, "fail")])
def test_memory_is_compared_with_what_the_run_takes(free: float, state: str):
    planned = replace(GPT2, node_bytes=3.5 * 2**30, node_how="weights 1 GiB + AdamW 2.5 GiB")
    found = [Finding("memory", "ok", "", nodes=(n,), value=free, unit="GiB") for n in NODES]
    [one] = judge(found, nodes=NODES, needs=planned)
    assert one.state == state
    assert one.needs.startswith("3.5 (`hfscale plan` says so of 1 ranks: weights 1 GiB")


def test_checkpoints_that_are_there_take_no_more_room():
    assert GPT2.free_space().least == pytest.approx(3 * 1.488)
    assert replace(GPT2, kept=2).free_space().least == pytest.approx(1.488)
    assert "2 are there" in replace(GPT2, kept=2).free_space().how


def test_nodes_are_not_judged_by_what_a_login_node_has():
    planned = replace(GPT2, node_bytes=2**33, node_how="all of it")
    found = [Finding("memory", "ok", "", nodes=("n1",), value=2.5, unit="GiB")]
    assert judge(found, nodes=("n1",), needs=planned)[0].state == "fail"
    login = replace(planned, elsewhere=True)
    assert judge(found, nodes=("n1",), needs=login)[0].state == "ok"
