"""The table of devices, and the machine of a recipe's `cluster`."""

from __future__ import annotations

from typing import Any

import pytest

from minitron_mcore.errors import InputError
from minitron_mcore.runtime.config import ClusterConfig
from minitron_mcore.runtime.devices import DEVICES, find_device, machine_of, peak_tflops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("AMD Instinct MI300X", 1307.4),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_peaks_by_the_makers_data_sheets(name: str, peak: float | None) -> None:
    """Names as torch.cuda.get_device_name gives them."""
    assert peak_tflops(name) == peak


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 PCIe 40GB"),
        ("a100", "A100"),
        ("h100-pcie", "H100 PCIe"),
    ],
)
def test_the_longest_row_counts(name: str, row: str) -> None:
    assert find_device(name) == DEVICES[row]


@pytest.mark.parametrize("name", DEVICES)
def test_rows_are_of_a_size_with_each_other(name: str) -> None:
    """A digit that slipped shows: between 40 and 350 operations for a byte of memory but on the small boards, fp8 twice
    bf16, best products below the peak."""
    row = find_device(name)
    assert row == DEVICES[name] and row.sheet.split()[0] in ("NVIDIA", "AMD")
    assert 35 <= 1000 * row.bf16 / row.memory_bandwidth <= 450
    assert row.fp8 is None or row.fp8 == pytest.approx(2 * row.bf16, rel=0.02)
    assert row.best_matmul is None or 0.5 < row.best_matmul / row.bf16 < 0.95
    assert row.inter_node is None or row.inter_node < (row.intra_node or 0)


def test_own_values_come_first() -> None:
    sheet = machine_of(ClusterConfig(device="H100"))
    assert sheet.peak_flops == 989.4e12 and sheet.memory_bandwidth == 3350e9 and sheet.memory == 80e9
    assert sheet.need("intra_node_bandwidth") == 450e9 and sheet.need("power") == 700
    own: dict[str, Any] = {"peak_tflops": 500.0, "memory_bandwidth": 3000.0, "gpu_memory": 79 << 30, "efficiency": 0.5}
    machine = machine_of(ClusterConfig(device="H100", gpus_per_node=4, overlap=0.9, price=2.5, **own))
    assert (machine.peak_flops, machine.memory_bandwidth) == (500e12, 3000e9)
    assert (machine.memory, machine.efficiency, machine.price) == (79 << 30, 0.5, 2.5)
    assert (machine.gpus_per_node, machine.overlap) == (4, 0.9)
    assert machine.peak_flops_fp8 == sheet.peak_flops_fp8, "what is not given is still the sheet's"


def test_efficiency_is_of_measured_products_where_there_are_any() -> None:
    """0.9 x 792.1 / 989.4 by hand; the A40 has no measurement."""
    assert machine_of(ClusterConfig(device="H100")).efficiency == pytest.approx(0.7205, abs=1e-4)
    assert machine_of(ClusterConfig(device="A40")).efficiency == 0.7


def test_an_unknown_device_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"^cluster\.device=H101 is not in the table.*did you mean H100\?"):
        machine_of(ClusterConfig(device="H101"))
    with pytest.raises(InputError, match=r"cluster\.device=abacus .*leave it out, and give cluster\.peak_tflops"):
        machine_of(ClusterConfig(device="abacus"))


def test_a_figure_that_is_nowhere_is_refused_where_it_is_needed() -> None:
    with pytest.raises(InputError, match=r"^cluster\.peak_tflops is not given, .*cluster\.device=H100"):
        machine_of(ClusterConfig()).peak("bf16")
    with pytest.raises(InputError, match=r"^cluster\.inter_node_bandwidth is not given, .*cluster\.device=L4: give it"):
        machine_of(ClusterConfig(device="L4")).need("inter_node_bandwidth")
    assert machine_of(ClusterConfig(device="L4", inter_node_bandwidth=12.5)).need("inter_node_bandwidth") == 12.5e9
    with pytest.raises(InputError, match=r"^cluster\.peak_tflops_fp8 "):
        machine_of(ClusterConfig(device="A100")).peak("fp8")
