"""Seconds of one operation, and of one collective, on a machine. Pure.

A collective over n ranks in a ring moves (n - 1) / n of its bytes into and out of each rank, an all-reduce twice that;
beside the bytes it takes a latency for each doubling of the ranks. Bandwidths are what one GPU sends: a ring over
several nodes crosses between them on the links of all its GPUs of a node at once.

`stride`: the ranks of a group are so many ranks of the world apart, 1 for neighbours (Megatron's order: tensor fastest,
then context, data, pipeline).
"""

from __future__ import annotations

from math import ceil, log2

from minitron_mcore.architecture import BYTES
from minitron_mcore.runtime.devices import Machine


def product(machine: Machine, rows: float, inner: float, columns: float, precision: str) -> float:
    """[rows, inner] times [inner, columns], of numbers of `precision`."""
    element = BYTES.get(precision, 1)
    moved = element * (rows * inner + inner * columns + rows * columns)
    return operation(machine, 2 * rows * inner * columns, moved, precision)


def operation(machine: Machine, flops: float, moved: float, precision: str) -> float:
    """The longer of `flops` at the rate that products of `precision` reach, and `moved` bytes at the memory's."""
    rate = machine.peak(precision) * machine.efficiency
    return max(flops / rate, traffic(machine, moved))


def traffic(machine: Machine, moved: float) -> float:
    """Of `moved` bytes that a device reads and writes in its own memory."""
    return moved / (machine.need("memory_bandwidth") * machine.memory_efficiency)


def gather(machine: Machine, whole: float, ranks: int, *, stride: int = 1, calls: int = 1) -> float:
    """An all-gather to `whole` bytes on each of `ranks`, or a reduce-scatter of as many, in so many calls."""
    return _ring(machine, whole, ranks, stride, calls)


def all_reduce(machine: Machine, whole: float, ranks: int, *, stride: int = 1, calls: int = 1) -> float:
    """Of `whole` bytes, in so many calls."""
    return _ring(machine, 2 * whole, ranks, stride, calls)


def _ring(machine: Machine, moved: float, ranks: int, stride: int, calls: int) -> float:
    if ranks == 1:
        return 0.0
    node = machine.gpus_per_node
    if (ranks - 1) * stride < node:
        bandwidth, latency = machine.need("intra_node_bandwidth"), machine.intra_node_latency
    else:
        bandwidth, latency = machine.need("inter_node_bandwidth"), machine.inter_node_latency
        together = min(ranks, max(1, node // stride))
        if together > 1:
            bandwidth = min(bandwidth * together, machine.need("intra_node_bandwidth"))
    return moved * (ranks - 1) / ranks / bandwidth + calls * latency * ceil(log2(ranks))


def send(machine: Machine, moved: float, *, world: int) -> float:
    """From one rank to another far away, in a world of so many."""
    if world <= machine.gpus_per_node:
        return moved / machine.need("intra_node_bandwidth") + machine.intra_node_latency
    return moved / machine.need("inter_node_bandwidth") + machine.inter_node_latency
