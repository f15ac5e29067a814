"""How long a save takes and whether a warning leaves time for it; and what doctor measured in place
of what is assumed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from hfscale.checks.finding import NO_GPU, Finding, measured, product_rate
from hfscale.checks.measured import read_measured
from hfscale.errors import ConfigError
from hfscale.models.devices import CPU, GB, device_named
from hfscale.planning.corrections import corrections
from hfscale.planning.figures import Figure
from hfscale.planning.memory import Setup
from hfscale.planning.plan import make_plan
from hfscale.planning.saving import COMMIT_S, HASHED, save
from hfscale.planning.site import BUS_SPEED, DISK_SPEED, PRODUCTS, Asked, Measured, Site
from launch.commands.plan import plan as plan_verb
from tests.planning.test_check import run_at
from tests.planning.test_plan import LLAMA_70B, config_of

SETUP = Setup(
    stage=1,
    precision="bf16",
    offload="none",
    checkpointing=False,
    micro_batch=1,
    accumulation=1,
    ranks=16,
    a_node=8,
)
SHARE = Figure("save buffers", 7e9, "bytes", "seven gigabytes a rank")
STEP = Figure("step", 5.0, "s", "")


def site(gpu: str = "h100", **more: Any) -> Site:
    return Site(device_named(gpu), 16, 8, None, 80e9, **more)


def test_a_save_by_hand_and_what_training_waits_for_it():
    writing = 7e9 / HASHED + 8 * 7e9 / DISK_SPEED + COMMIT_S
    behind = save(SETUP, SHARE, site())
    assert behind.copy.value == pytest.approx(7e9 / BUS_SPEED)
    assert behind.writing.value == pytest.approx(writing)
    assert behind.stall.value == behind.copy.value
    inside = save(replace(SETUP, async_save=False), SHARE, site())
    assert inside.whole.value == behind.whole.value == inside.stall.value
    # one may be under way when the warning comes: not where training waits for it
    late = [one.after_warning(STEP, one.whole).value for one in (behind, inside)]
    assert late == pytest.approx([5 + 2 * writing + 7e9 / BUS_SPEED, 5 + writing + 7e9 / BUS_SPEED])


def test_a_warning_that_leaves_no_time_for_a_save_is_said():
    large = config_of(model__config=LLAMA_70B, data__seq_len=4096)
    asked = Asked(gpu="h100", gpus=32)
    plan = make_plan(large, asked)
    assert plan.figure("a save", "save").value > 100
    [line] = [line for line in plan.advice if "signal_s" in line]
    value = int(line.partition("signal_s=")[2].partition(":")[0])
    again = make_plan(large.model_copy(update={"cluster": _warned(large, value)}), asked)
    assert not [line for line in again.advice if "signal_s" in line]


def _warned(config: Any, seconds: int) -> Any:
    return config.cluster.model_copy(update={"signal_s": seconds})


def test_saves_that_come_faster_than_they_are_written_are_said():
    config = config_of(checkpoint__every_steps=1, model__config={"vocab_size": 50_000})
    asked = Asked(gpu="h100", gpus=1)
    assert any("waits for the one before" in line for line in make_plan(config, asked).advice)
    seldom = config_of(checkpoint__every_steps=100_000, checkpoint__every_minutes=None)
    assert not any("the one before" in line for line in make_plan(seldom, asked).advice)


# ---------------------------------------------------------------------------------- what doctor saw
def report_at(file: Path, *, gpus: bool = False, nodes: int = 1, **values: float) -> Path:
    """Write what doctor prints of machines on which these were measured."""
    units = {
        "all_reduce": ("all-reduce", "GB/s (bus bandwidth, gloo)"),
        "writing": ("writing", "MB/s a node"),
        "memory_speed": ("memory speed", "GB/s a rank"),
        "fp32": ("matrix products", product_rate("fp32")),
        "bf16": ("matrix products", product_rate("bf16")),
    }
    findings = [Finding("GPU", "ok", "8 x NVIDIA H100" if gpus else NO_GPU)]
    findings += [measured(*_row(units[name], value)) for name, value in values.items()]
    lines = [asdict(one) for one in findings]
    names = [f"n{number}" for number in range(nodes)]
    said = {"ok": True, "nodes": names, "bad_nodes": [], "findings": lines}
    file.write_text(json.dumps(said))
    return file


def _row(unit: tuple[str, str], value: float) -> tuple[str, float, str]:
    return unit[0], value, unit[1]


def test_a_plan_takes_what_doctor_measured(tmp_path: Path):
    seen = {"all_reduce": 2.0, "writing": 50.0, "memory_speed": 8.0, "fp32": 0.25, "bf16": 0.5}
    file = report_at(tmp_path / "doctor.json", **seen)
    known = read_measured(file)
    assert (known.exchange, known.disk, known.memory) == (2 * GB, 0.05 * GB, 8 * GB)
    assert known.flops == {"fp32": 0.25e12, "bf16": 0.5e12} and known.on_cpu
    here = Site(CPU, 2, 2, None, 8e9, known)
    assert (here.flops("bf16").speed, here.memory.speed) == (PRODUCTS * 0.5e12, 8 * GB)
    assert (here.exchange.speed, here.disk.speed) == (2 * GB, 0.05 * GB)
    plan = make_plan(config_of(), Asked(gpu="cpu", gpus=2, memory_gib=8, measured=known))
    assert plan.text(explain=True).count("as doctor measured") >= 4
    assert not any("--doctor" in line for line in plan.assumed)
    assert any("--doctor" in line for line in make_plan(config_of(), Asked("cpu", 2)).assumed)


def test_what_was_measured_elsewhere_is_not_taken(tmp_path: Path):
    cores = read_measured(report_at(tmp_path / "cores.json", all_reduce=2.0, writing=500.0))
    plan = make_plan(config_of(), Asked(gpu="h100", gpus=8, measured=cores))
    assert any("only the disk" in line for line in plan.assumed)
    assert "0.5 GB/s a node" in plan.figure("a save", "  writing").how
    apart = read_measured(
        report_at(tmp_path / "apart.json", gpus=True, nodes=2, all_reduce=20.0, writing=500.0)
    )
    together = make_plan(config_of(), Asked(gpu="h100", gpus=8, measured=apart))
    assert any("the network is not taken" in line for line in together.assumed)
    joined = make_plan(config_of(), Asked(gpu="rtx4090", gpus=16, measured=apart))
    assert "as doctor measured over 2 nodes" in joined.figure("a step", "  communication").how
    asked = Asked(gpu="rtx4090", gpus=16, measured=apart, network_gb_s=3.0)
    assert "x 3 GB/s" in make_plan(config_of(), asked).figure("a step", "  communication").how


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ok    memory  3 GiB", "not JSON"),
        ('{"nodes": ["n1"]}', "findings"),
        ('{"nodes": [], "findings": []}', "nothing in it was measured"),
        ('{"nodes": [], "findings": [{"check": "writing", "said": "", "value": -3}]}', "no speed"),
        ('{"nodes": [], "findings": [{"check": "writing", "said": "", "value": NaN}]}', "no speed"),
    ],
)
def test_what_is_not_doctors_is_refused(tmp_path: Path, text: str, words: str):
    file = tmp_path / "doctor.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_measured(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        plan_verb("config.yaml", doctor=tmp_path / "missing.json")


def test_times_are_learnt_of_plans_with_the_same_speeds(tmp_path: Path):
    file = report_at(tmp_path / "doctor.json", writing=50.0, memory_speed=5.0, fp32=0.1)
    run_dir = run_at(tmp_path / "runs", "one", memory_gib=2, step_s=1)
    plan_verb(str(run_dir), doctor=file, checked=True)
    apart, alike = (
        corrections(tmp_path / "runs", device="cpu", measured=one) for one in (False, True)
    )
    assert set(apart) == {"memory"} and set(alike) == {"memory", "step", "save"}
    known: Measured = read_measured(file)
    config = config_of(run__root=str(tmp_path / "runs"))
    plan = make_plan(config, Asked(gpu="cpu", gpus=2, memory_gib=8, measured=known))
    assert plan.figure("as checked runs", "save").value > 0
