"""From what was found to a verdict: what is wrong, where, what to do, and which nodes a job should
leave out.

A measurement is compared with what the run needs, and with what the other ranks have. What is
enough for the run is ok, however the others are; where only what is usual is known, who stands out
is told. A node is bad if it fails what other nodes pass, or does not answer. What all nodes fail is
no node's fault.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from hfscale.checks.finding import STATES, Finding, figure
from hfscale.checks.needs import Need, Needs
from hfscale.checks.table import BY_NAME
from hfscale.errors import shown


def judge(
    findings: Sequence[Finding], *, nodes: Collection[str], needs: Needs = Needs()
) -> list[Finding]:
    """Return the findings of all ranks, each with its node; those that say the same are one, with
    its nodes if they are not all of them and the least value that was measured.
    """
    judged = []
    for check, unit in dict.fromkeys((one.check, one.unit) for one in findings):
        of_check = [one for one in findings if (one.check, one.unit) == (check, unit)]
        enough = [against_need(one, needs) for one in of_check]
        groups: dict[Finding, set[str]] = {}
        least: dict[Finding, float] = {}  # of what was measured
        for one in against_others(enough, need=_need(check, needs)):
            alike = replace(one, nodes=(), value=None)
            groups.setdefault(alike, set()).update(one.nodes)
            if one.value is not None:
                least[alike] = min(one.value, least.get(alike, one.value))
        common = max(groups, key=lambda one: len(groups[one]))
        for kind, there in groups.items():
            one = replace(kind, value=least.get(kind))
            everywhere = there >= set(nodes)
            if BY_NAME[check].alike and one.state == "ok" and kind != common:
                one = _unlike(one, common)
            one = replace(one, remedy=_remedy(one, everywhere=everywhere))
            judged.append(replace(one, nodes=() if everywhere else tuple(sorted(there))))
    return judged


def against_need(finding: Finding, needs: Needs) -> Finding:
    """Return a finding with what the run needs of it, and the state that follows."""
    need = _need(finding.check, needs)
    if need is None or finding.value is None:
        return finding
    short = (finding.value < need.least) + (finding.value < need.fatal)
    state = STATES[short] if finding.state == "ok" else finding.state
    # what is merely usual is worth a word where it is not there
    told = need.how and not (need.usual and state == "ok")
    needed = f"{figure(need.least)} ({need.how})" if told else ""
    return replace(finding, state=state, needs=needed)


def against_others(findings: Sequence[Finding], *, need: Need | None) -> list[Finding]:
    """Return the findings of a check with what each measurement means beside the others. A range is
    of those that are ok.
    """
    values = [one.value for one in findings if one.value is not None]
    usual = statistics.median_high(values or [0.0])
    settled = need is not None and not need.usual and need.least > 0
    compared = [one if settled else _slower(one, usual) for one in findings]
    fine = [one.value for one in compared if one.value is not None and one.state == "ok"]
    judged = []
    for one in compared:
        if one.value is not None and one.unit and one.state == "ok":
            edges = dict.fromkeys(figure(edge(fine)) for edge in (min, max))
            one = replace(one, said=f"{' to '.join(edges)} {one.unit}")
        judged.append(one)
    return judged


def _slower(one: Finding, usual: float) -> Finding:
    """Return a finding that is worse if it is too small a part of what is ``usual``."""
    if one.value is None or one.state != "ok":
        return one
    state = STATES[sum(one.value < part * usual for part in one.slow)]
    if state == "ok":
        return one
    check = BY_NAME[one.check]
    words = f"{figure(one.value)} (median of all ranks: {figure(usual)}) {one.unit}"
    # the others do well: what they use, shards for one, is not to blame
    return replace(one, state=state, said=words, remedy=check.alone or check.remedy)


def _unlike(one: Finding, common: Finding) -> Finding:
    words = f"{one.said}; most nodes: {common.said}"
    return replace(one, state="warn", said=words, remedy="make the nodes alike")


def _need(check: str, needs: Needs) -> Need | None:
    need = BY_NAME[check].need
    return need(needs) if need else None


def _remedy(one: Finding, *, everywhere: bool) -> str:
    """Return what to do: where only some nodes are short of something, they are to be mended."""
    if one.state == "ok":
        return ""
    check = BY_NAME[one.check]
    short_here_alone = one.unit and not everywhere
    return one.remedy or (short_here_alone and check.alone) or check.remedy


def bad_nodes(findings: Iterable[Finding]) -> list[str]:
    """Return the nodes that failed something which not all nodes failed. To meet is a matter of
    all.
    """
    failures = [one for one in findings if one.state == "fail" and one.check != "rendezvous"]
    return sorted({node for one in failures for node in one.nodes})


def table(findings: Sequence[Finding]) -> str:
    """Return the findings as lines, with what to do below those that are not ok."""
    width = max(len(one.check) for one in findings)
    lines = []
    for one in findings:
        nodes = f"{', '.join(one.nodes)}: " if one.nodes else ""
        words = f"{nodes}{shown(one.said, lines=True)}{_needed(one)}"
        lines.append(f"{one.state:<6}{one.check:<{width}}  {words}")
        if one.remedy:
            lines.append(f"{'':{width + 8}}-> {one.remedy}")
    return "\n".join(lines)


def _needed(one: Finding) -> str:
    if not one.needs:
        return ""
    return f"; enough: needs {one.needs}" if one.state == "ok" else f"; needs {one.needs}"
