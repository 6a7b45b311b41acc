"""Seconds of one operation, and of one collective, on a machine. Pure.

A collective over n ranks in a ring moves (n - 1) / n of its bytes into and out of each rank, an all-reduce twice that;
beside the bytes it takes a latency for each doubling of the ranks. Bandwidths are what one GPU sends.
"""

from __future__ import annotations

from math import ceil, log2

from minitron_mcore.runtime.devices import Machine


def operation(machine: Machine, flops: float, moved: float, precision: str) -> float:
    """The longer of `flops` at the rate that products of `precision` reach, and `moved` bytes at the memory's."""
    rate = machine.peak(precision) * machine.efficiency
    return max(flops / rate, traffic(machine, moved))


def traffic(machine: Machine, moved: float) -> float:
    """Of `moved` bytes that a device reads and writes in its own memory."""
    return moved / (machine.need("memory_bandwidth") * machine.memory_efficiency)


def gather(machine: Machine, whole: float, ranks: int, *, spread: int) -> float:
    """An all-gather to `whole` bytes on each of `ranks`, or a reduce-scatter of as many.

    spread: the consecutive ranks of the world that the group spans. Where they lie on several nodes its bytes cross
    between these at their bandwidth, shared with nothing else; else they stay in a node.
    """
    if ranks == 1:
        return 0.0
    bandwidth, latency = link(machine, spread)
    return whole * (ranks - 1) / ranks / bandwidth + latency * ceil(log2(ranks))


def all_reduce(machine: Machine, whole: float, ranks: int, *, spread: int) -> float:
    """Of `whole` bytes; as `gather`, twice."""
    return 2 * gather(machine, whole, ranks, spread=spread)


def send(machine: Machine, moved: float, *, spread: int) -> float:
    """From one rank to another, `spread` - 1 ranks further."""
    bandwidth, latency = link(machine, spread)
    return moved / bandwidth + latency


def link(machine: Machine, spread: int) -> tuple[float, float]:
    """(bytes a second, seconds before them) of the slowest link within `spread` consecutive ranks."""
    if spread <= machine.gpus_per_node:
        return machine.need("intra_node_bandwidth"), machine.intra_node_latency
    return machine.need("inter_node_bandwidth"), machine.inter_node_latency
