"""What a device can do, from its maker's data sheet, and the machine that a recipe's `cluster` describes. Pure."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from minitron_mcore.errors import InputError
from minitron_mcore.runtime.config import ClusterConfig


class Device(NamedTuple):
    """A row of the table. Peaks are dense, without sparsity, in TFLOP/s; fp32 without tensor cores, as torch multiplies
    by default. Memory in 10^9 bytes, as sheets count it (a device may report a few percent more). Bandwidths in GB/s,
    each way: of its memory, to other devices of a node, and to other nodes in the maker's own systems (None where those
    differ). Power in watts, of the device alone."""

    bf16: float
    fp8: float | None
    fp32: float
    memory: float
    memory_bandwidth: float
    intra_node: float | None
    inter_node: float | None
    power: float
    sheet: str
    best_matmul: float | None = None  # TFLOP/s of the best bf16 product that was measured


# By the words that are in a device's name, as torch.cuda.get_device_name gives it or as people say it. Of several rows
# the one with the longest name counts: `NVIDIA A100-SXM4-40GB` is `A100 40GB`. Between nodes: DGX A100 has 200 Gb/s for
# each GPU, DGX H100, H200 and B200, GB200 NVL72 and AMD's platform 400. Boards whose bridges join two alone talk over
# PCI Express, 4 or 5. Best products: Maximum Achievable Matmul FLOPS as github.com/mag-/gpu_benchmark collects them; of
# the A800, the H800 and the H200 those of the A100 and the H100, which have the same cores.
DEVICES: dict[str, Device] = {
    "A30": Device(165, None, 10.3, 24, 933, 32, None, 165, "NVIDIA A30 data sheet"),
    "A40": Device(149.7, None, 37.4, 48, 696, 32, None, 300, "NVIDIA A40 data sheet"),
    "A100": Device(312, None, 19.5, 80, 2039, 300, 25, 400, "NVIDIA A100 data sheet, 80GB SXM", 267.9),
    "A100 40GB": Device(312, None, 19.5, 40, 1555, 300, 25, 400, "NVIDIA A100 data sheet, 40GB SXM", 267.9),
    "A100 PCIe": Device(312, None, 19.5, 80, 1935, 32, None, 300, "NVIDIA A100 data sheet, 80GB PCIe", 256.4),
    "A100 PCIe 40GB": Device(312, None, 19.5, 40, 1555, 32, None, 250, "NVIDIA A100 data sheet, 40GB PCIe", 256.4),
    "A800": Device(312, None, 19.5, 80, 2039, 200, 25, 400, "NVIDIA A800 data sheet, 80GB SXM", 267.9),
    "L4": Device(121, 242.5, 30.3, 24, 300, 32, None, 72, "NVIDIA L4 data sheet", 91.4),
    "L40": Device(181, 362, 90.5, 48, 864, 32, None, 300, "NVIDIA L40 data sheet", 170.3),
    "L40S": Device(362, 733, 91.6, 48, 864, 32, None, 350, "NVIDIA L40S data sheet", 252.0),
    "H20": Device(148, 296, 44, 96, 4000, 450, 50, 400, "NVIDIA H20 data sheet"),
    "H100": Device(989.4, 1978.9, 66.9, 80, 3350, 450, 50, 700, "NVIDIA H100 data sheet, SXM", 792.1),
    "H100 PCIe": Device(756, 1513, 51.2, 80, 2000, 64, None, 350, "NVIDIA H100 data sheet, PCIe", 499.5),
    "H100 NVL": Device(835.5, 1671, 60, 94, 3900, 64, None, 400, "NVIDIA H100 data sheet, NVL", 488.5),
    "H800": Device(989.4, 1978.9, 66.9, 80, 3350, 200, 50, 700, "NVIDIA H800 data sheet, SXM", 792.1),
    "H200": Device(989.4, 1978.9, 66.9, 141, 4800, 450, 50, 700, "NVIDIA H200 data sheet, SXM", 792.1),
    "H200 NVL": Device(835.5, 1671, 60, 141, 4800, 450, None, 600, "NVIDIA H200 data sheet, NVL"),
    "GH200": Device(
        989.4, 1978.9, 66.9, 96, 4000, 450, 50, 900, "NVIDIA GH200 data sheet, HBM3; power with the CPU", 842.5
    ),
    "B200": Device(2250, 4500, 75, 180, 7700, 900, 50, 1000, "NVIDIA HGX B200 data sheet, an eighth"),
    "GB200": Device(2500, 5000, 80, 186, 8000, 900, 50, 1200, "NVIDIA GB200 NVL72 data sheet, a 72nd"),
    "MI300X": Device(1307.4, 2614.9, 163.4, 192, 5300, 448, 50, 750, "AMD Instinct MI300X data sheet", 758.3),
}

# What matrix products reach where nobody measured: of the best measured one of a device nine tenths, since a model's
# products have no best shape; of devices without one, this share of the peak (docs/estimate.md).
OF_THE_BEST, EFFICIENCY = 0.9, 0.7


def find_device(name: str) -> Device | None:
    """The row of a device by its name; None where the table lacks it."""
    words = {*name.upper().replace("-", " ").split()}
    known = [row for row in DEVICES if words >= {*row.upper().split()}]
    return DEVICES[max(known, key=len)] if known else None


def peak_tflops(device_name: str, precision: str = "bf16") -> float | None:
    """Dense peak of a device by its name, of bf16 or fp8 products; None if the table lacks it."""
    found = find_device(device_name)
    return (found.fp8 if precision == "fp8" else found.bf16) if found else None


@dataclass(frozen=True)
class Machine:
    """What times are worked out from. FLOP/s, bytes, bytes a second, seconds, watts; None: not known, and refused where
    it is asked for (`need`)."""

    device: str | None = None
    peak_flops: float | None = None  # bf16
    peak_flops_fp8: float | None = None
    peak_flops_fp32: float | None = None
    memory: float | None = None
    memory_bandwidth: float | None = None
    intra_node_bandwidth: float | None = None
    inter_node_bandwidth: float | None = None
    host_bandwidth: float = 25e9  # to and from the host's memory, over PCI Express 4
    memory_efficiency: float = 0.85  # share of the memory's bandwidth that kernels reach
    attention_efficiency: float = 0.6  # of the rate of products, what causal attention reaches
    kernel_latency: float = 3e-6  # of the smallest kernel, with the gap before the next
    intra_node_latency: float = 1e-5  # of a collective beside its bytes, for each doubling of its ranks
    inter_node_latency: float = 2e-5
    gpus_per_node: int = 8
    efficiency: float = EFFICIENCY
    overlap: float | None = None  # None: worked out (estimate/overlap.py)
    power: float | None = None
    price: float | None = None

    def need(self, name: str) -> float:
        """The figure `name`. Raises InputError, naming the key of `cluster` that gives it, where it is not known."""
        value = getattr(self, name)
        if value is None:
            key = f"cluster.{_KEYS[name]}"
            whose = (
                f"the table has none of cluster.device={self.device}" if self.device else "no cluster.device says it"
            )
            remedy = "give it" if self.device else "give it, or name a device, as cluster.device=H100"
            raise InputError(key, None, f"is not given, and {whose}", remedy)
        return float(value)

    def peak(self, precision: str) -> float:
        """FLOP/s of matrix products of fp32, bf16 or fp8 numbers at best. Raises InputError where it is not known."""
        return self.need({"bf16": "peak_flops", "fp8": "peak_flops_fp8", "fp32": "peak_flops_fp32"}[precision])


# Figure -> the key of `cluster` that gives it, and how much of the figure's unit one of the key's is.
_KEYS = {
    "peak_flops": "peak_tflops",
    "peak_flops_fp8": "peak_tflops_fp8",
    "peak_flops_fp32": "peak_tflops_fp32",
    "memory": "gpu_memory",
    "memory_bandwidth": "memory_bandwidth",
    "intra_node_bandwidth": "intra_node_bandwidth",
    "inter_node_bandwidth": "inter_node_bandwidth",
    "efficiency": "efficiency",
    "power": "power",
    "price": "price",
}
_UNITS = {"memory": 1.0, "efficiency": 1.0, "power": 1.0, "price": 1.0, "memory_bandwidth": 1e9}
_UNITS |= {"intra_node_bandwidth": 1e9, "inter_node_bandwidth": 1e9}


def machine_of(cluster: ClusterConfig) -> Machine:
    """The machine of a recipe's `cluster`: its own keys before the table's row of `cluster.device`.

    Raises InputError for a device that the table lacks. A figure that neither gives is refused where it is needed.
    """
    of_device = Machine() if cluster.device is None else _of_device(cluster.device)
    own = {name: getattr(cluster, key) for name, key in _KEYS.items()}
    given: dict[str, Any] = {name: value * _UNITS.get(name, 1e12) for name, value in own.items() if value is not None}
    return replace(of_device, gpus_per_node=cluster.gpus_per_node, overlap=cluster.overlap, **given)


def _of_device(name: str) -> Machine:
    row = find_device(name)
    if row is None:
        near = difflib.get_close_matches(name.upper(), [each.upper() for each in DEVICES], n=1, cutoff=0.4)
        mean = next((f"did you mean {each}? else " for each in DEVICES if each.upper() in near), "")
        remedy = f"{mean}leave it out, and give cluster.peak_tflops, cluster.memory_bandwidth and what is asked for"
        raise InputError("cluster.device", name, "is not in the table of devices (docs/estimate.md)", remedy)
    return Machine(
        device=name,
        peak_flops=row.bf16 * 1e12,
        peak_flops_fp8=row.fp8 * 1e12 if row.fp8 else None,
        peak_flops_fp32=row.fp32 * 1e12,
        memory=row.memory * 1e9,
        memory_bandwidth=row.memory_bandwidth * 1e9,
        intra_node_bandwidth=row.intra_node * 1e9 if row.intra_node else None,
        inter_node_bandwidth=row.inter_node * 1e9 if row.inter_node else None,
        efficiency=OF_THE_BEST * row.best_matmul / row.bf16 if row.best_matmul else EFFICIENCY,
        power=row.power,
    )
