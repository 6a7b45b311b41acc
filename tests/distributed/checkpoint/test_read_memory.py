"""What reading a checkpoint takes: the parts that a rank keeps, and one stored tensor at a time beside them.

Tolerance: 16 MiB, for what Python and torch take meanwhile; a second tensor in memory would be 32 MiB.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minitron_mcore.architecture import Architecture, build_architecture
from minitron_mcore.layout import parameter_table
from tests.distributed.ranks import run_on_ranks

MIB = 2**20


def architecture() -> Architecture:
    """Its largest tensor, a layer's fc1 in float32, takes 32 MiB; all together 216 MiB."""
    return build_architecture(
        {"num_layers": 4, "hidden_size": 512, "ffn_hidden_size": 8192, "num_attention_heads": 4, "vocab_size": 128}
    )


def peak_on_rank(folder: Path) -> tuple[int, int]:
    """(bytes that the parts take, how far memory rose above what was there before)"""
    from torch.distributed import checkpoint

    from minitron_mcore.checkpoint.reader import TensorReader

    a, place = architecture(), folder / "iter_0000000"
    place.mkdir()
    layers: list[tuple[str, tuple[int, ...]]] = []
    for parameter in parameter_table(a):
        names = [parameter.key.replace("layers.", f"layers.{layer}.") for layer in range(4)]
        layers += [(name, parameter.shape(a)) for name in (names if parameter.per_layer else [parameter.key])]
    checkpoint.save({name: torch.ones(shape) for name, shape in layers}, checkpoint_id=place, no_dist=True)
    torch.save({}, place / "common.pt")
    (place / "metadata.json").write_text("{}")
    wanted = [
        (parameter, layer)
        for parameter in parameter_table(a)
        for layer in (range(a.num_layers) if parameter.per_layer else [None])
    ]
    # Loads what reading imports, so that it is there before.
    TensorReader(place, 0).read_part(wanted[0][0], a, wanted[0][1], 0, 2)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    reader = TensorReader(place, 0)
    parts = [reader.read_part(parameter, a, layer, 1, 2) for parameter, layer in wanted]
    return sum(part.nbytes for part in parts), memory("VmHWM") - before


def memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's record of peak memory")
def test_one_tensor_beside_the_parts(tmp_path: Path) -> None:
    kept, rose = run_on_ranks(peak_on_rank, 1, tmp_path)[0]
    print(f"parts {kept / MIB:.0f} MiB, peak {rose / MIB:.0f} MiB above what was there")
    assert kept > 100 * MIB
    assert rose < kept + 32 * MIB + 16 * MIB
