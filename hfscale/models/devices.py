"""The accelerators that are known: memory, speed of memory, peaks by precision, and how they are
joined. The one table of them: `hfscale plan` computes with it, and the MFU is measured against it.

Peaks are dense (without sparsity), of tensor cores at 16 bit and of plain cores at 32 (torch leaves
TF32 off). Memory is what ``torch.cuda.mem_get_info`` calls total, where that is known, else the
vendor's figure less the part that ECC and the driver keep; links and networks are of one GPU in one
direction. Sources are the vendors' data sheets, named at each entry; networks are those of the
vendor's own node (DGX, HGX, OAM), and unknown for cards that are put into all kinds of machines.
"""

from __future__ import annotations

from dataclasses import dataclass

from hfscale.errors import ConfigError, nearest

T = 1e12
GB = 1e9


@dataclass(frozen=True)
class Device:
    """An accelerator. Speeds are of one of them: flop/s, and bytes a second in one direction."""

    key: str  # as `--gpu` takes it
    name: str
    seen: tuple[str, ...]  # parts of what torch calls it; nothing: it is planned with only
    memory_gib: float
    memory_speed: float  # bytes a second, of its own memory
    flops_16: float
    flops_32: float
    link: float  # to another one of its node
    network: float | None  # to one of another node; None: depends on the machine
    a_node: int = 8  # how many a node usually has

    def peak(self, precision: str) -> float:
        """Return the flop/s of matrix products at ``precision`` (fp32, bf16, fp16)."""
        return self.flops_32 if precision == "fp32" else self.flops_16


PCIE_4, PCIE_3 = 32 * GB, 16 * GB

# the first whose part of the name matches wins
DEVICES = (
    # NVIDIA Blackwell data sheets (2024, 2025): 192 and 186 GB, NVLink 5
    Device("gb200", "GB200", ("GB200",), 184.0, 8000 * GB, 2500 * T, 80 * T, 900 * GB, 50 * GB, 4),
    Device("b200", "B200", ("B200",), 178.0, 8000 * GB, 2250 * T, 75 * T, 900 * GB, 50 * GB),
    # NVIDIA H200 data sheet (2024): 141 GB HBM3e; DGX H200: 400 Gb/s a GPU
    Device("h200", "H200", ("H200",), 139.8, 4800 * GB, 989 * T, 67 * T, 450 * GB, 50 * GB),
    # NVIDIA H100 data sheet (2023): PCIe, NVL and SXM; DGX H100: 400 Gb/s a GPU
    Device(
        "h100-pcie", "H100 PCIe", ("H100 PCIe",), 79.1, 2000 * GB, 756 * T, 51 * T, 64 * GB, None
    ),
    Device("h100-nvl", "H100 NVL", ("H100 NVL",), 93.1, 3900 * GB, 835 * T, 60 * T, 300 * GB, None),
    Device("h100", "H100 SXM", ("H100",), 79.1, 3350 * GB, 989 * T, 67 * T, 450 * GB, 50 * GB),
    Device("h800", "H800", ("H800",), 79.1, 3350 * GB, 989 * T, 67 * T, 200 * GB, 50 * GB),
    # NVIDIA A100 data sheet (2021): 40 and 80 GB; DGX A100: 200 Gb/s a GPU
    Device(
        "a100-40",
        "A100 40GB",
        ("A100-SXM4-40GB", "A100-PCIE-40GB"),
        39.4,
        1555 * GB,
        312 * T,
        19.5 * T,
        300 * GB,
        25 * GB,
    ),
    Device(
        "a100-80", "A100 80GB", ("A100",), 79.1, 2039 * GB, 312 * T, 19.5 * T, 300 * GB, 25 * GB
    ),
    Device("a800", "A800", ("A800",), 79.1, 2039 * GB, 312 * T, 19.5 * T, 200 * GB, 25 * GB),
    # NVIDIA Ada data sheets (2022, 2023)
    Device("l40s", "L40S", ("L40S",), 44.4, 864 * GB, 362 * T, 91.6 * T, PCIE_4, None),
    Device("l40", "L40", ("L40",), 44.4, 864 * GB, 181 * T, 90.5 * T, PCIE_4, None),
    Device("l4", "L4", ("L4",), 22.0, 300 * GB, 121 * T, 30.3 * T, PCIE_4, None),
    Device("rtx4090", "RTX 4090", ("RTX 4090",), 23.6, 1008 * GB, 165 * T, 82.6 * T, PCIE_4, None),
    # NVIDIA Ampere data sheets (2020, 2021)
    Device("a40", "A40", ("A40",), 44.4, 696 * GB, 150 * T, 37.4 * T, PCIE_4, None),
    Device("a30", "A30", ("A30",), 23.5, 933 * GB, 165 * T, 10.3 * T, PCIE_4, None),
    Device("a10", "A10", ("A10",), 22.0, 600 * GB, 125 * T, 31.2 * T, PCIE_4, None),
    Device("rtx3090", "RTX 3090", ("RTX 3090",), 23.6, 936 * GB, 71 * T, 35.6 * T, PCIE_4, None),
    # NVIDIA Volta (2018) and Turing (2019) data sheets
    Device("v100", "V100", ("V100",), 31.7, 900 * GB, 125 * T, 15.7 * T, 150 * GB, 12.5 * GB),
    Device("t4", "T4", ("T4",), 14.6, 320 * GB, 65 * T, 8.1 * T, PCIE_3, None),
    # AMD data sheets (2023, 2021): Infinity Fabric, seven links of 64 GB/s
    Device(
        "mi300x", "MI300X", ("MI300X",), 191.9, 5300 * GB, 1307 * T, 163.4 * T, 448 * GB, 50 * GB
    ),
    Device("mi250", "MI250", ("MI250",), 63.9, 1600 * GB, 362 * T, 45.3 * T, 100 * GB, 25 * GB),
)

# one rank of a machine without a GPU, on one of its cores: as this project's own tests run. Speeds
# are those of one core of a server with AVX-512 and AMX (Xeon, from 2023) as it was seen; of others
# `hfscale doctor` measures them, and `hfscale plan --check` learns what a step takes
CPU = Device("cpu", "CPU", (), 0.0, 22 * GB, 1.7 * T, 0.25 * T, 4 * GB, 1 * GB, 2)


def device_named(name: str) -> Device:
    """Return the device that a person calls ``name``: h100, A100-80, "RTX 4090".

    Raises:
        ConfigError: if none is known by it, with the nearest.
    """
    known = {one.key: one for one in (*DEVICES, CPU)}
    asked = name.strip().lower().removeprefix("nvidia ").removeprefix("amd ")
    plain = asked.replace(" ", "").replace("_", "-")
    for key in (asked, plain, asked.replace(" ", "-")):
        if key in known:
            return known[key]
    near = [key for key in known if plain and key.startswith(plain)]
    raise ConfigError(
        "no such GPU is known",
        where="--gpu",
        value=name,
        remedy=f"say which: {' or '.join(near)}" if near else nearest(plain, known),
    )


def device_seen(name: str) -> Device | None:
    """Return the device that torch calls ``name``; None: it is not known."""
    return next((one for one in DEVICES if any(part in name for part in one.seen)), None)
