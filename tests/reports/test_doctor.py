"""What the findings of all ranks come to: one line where they agree, and the nodes that stand
out.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from hfscale.errors import ConfigError
from hfscale.reports.doctor import Finding, bad_nodes, failed, judge, table

NODES = ("n1", "n2", "n3", "n4")
RATE = Finding("matrix products", "ok", "", unit="TFLOP/s", slow=(0.9, 0.75))


def rates(*values: float) -> list[Finding]:
    return [
        replace(RATE, value=value, nodes=(node,)) for node, value in zip(NODES, values, strict=True)
    ]


def test_ranks_that_agree_are_one_line():
    [one] = judge(rates(610.4, 612.0, 599.7, 640.0), nodes=NODES)
    assert (one.state, one.said, one.nodes, one.remedy) == ("ok", "600 to 640 TFLOP/s", (), "")


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
