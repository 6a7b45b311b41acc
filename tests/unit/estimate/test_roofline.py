"""The roofline of serving, against hand arithmetic at its limits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minitron_mcore.architecture import build_architecture
from minitron_mcore.errors import InputError
from minitron_mcore.estimate.config import ServingConfig
from minitron_mcore.estimate.roofline import serving_figures, serving_memory
from minitron_mcore.runtime.config import ClusterConfig
from minitron_mcore.runtime.devices import Machine, machine_of

LLAMA = build_architecture(
    {
        "num_layers": 32,
        "hidden_size": 4096,
        "ffn_hidden_size": 14336,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "vocab_size": 128256,
    }
)
H100 = machine_of(ClusterConfig(device="H100"))
# Nothing but the two limits: products at the peak, memory at its bandwidth.
IDEAL = replace(H100, efficiency=1.0, memory_efficiency=1.0, kernel_latency=0.0, intra_node_latency=0.0)


def figures(machine: Machine = IDEAL, **serving: Any) -> dict[str, float]:
    return serving_figures(LLAMA, ServingConfig(**serving), machine)


def test_memory_is_weights_and_cache() -> None:
    """8.03e9 parameters of two bytes; 2 x 32 layers x 8 groups x 128 x 2 bytes = 128 KiB a token."""
    serving = ServingConfig(batch_size=4, prompt_tokens=1000, output_tokens=24)
    assert serving_memory(LLAMA, serving) == 2 * LLAMA.num_parameters + 4 * 1024 * 131072
    assert serving_memory(LLAMA, replace(serving, tensor=8)) == serving_memory(LLAMA, serving)
    # 8 groups on 16 GPUs: each group lies on two of them.
    both = serving_memory(LLAMA, replace(serving, tensor=16)) - serving_memory(LLAMA, serving)
    assert both == 4 * 1024 * 131072


def test_narrow_formats_are_of_the_layers_matrices() -> None:
    serving = ServingConfig(batch_size=1, prompt_tokens=1, output_tokens=1)
    cache = 2 * 131072
    matrices = 32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336)
    rest = LLAMA.num_parameters - matrices
    assert serving_memory(LLAMA, replace(serving, weights="fp8")) == matrices + 2 * rest + cache
    assert serving_memory(LLAMA, replace(serving, weights="int4")) == matrices * 33 / 64 + 2 * rest + cache
    assert serving_memory(LLAMA, replace(serving, kv_cache="fp8")) == 2 * LLAMA.num_parameters + cache // 2
    assert serving_memory(LLAMA, replace(serving, kv_cache="fp16")) == 2 * LLAMA.num_parameters + cache


def test_decode_of_one_sequence_reads_the_weights() -> None:
    """Without the embedding, of which one row is read; activations and a short cache are under 1%."""
    found = figures(batch_size=1, prompt_tokens=16, output_tokens=16)
    read = 2 * (LLAMA.num_parameters - 128256 * 4096)
    assert found["decode_latency"] == pytest.approx(read / 3350e9, rel=0.01)
    assert found["decode_throughput"] == pytest.approx(1 / found["decode_latency"])


def test_prefill_of_a_long_prompt_is_its_products() -> None:
    """2 operations a parameter of the layers, 4 x width x half the prompt a layer for attention; the head is read
    once, for one token."""
    prompt = 8192
    found = figures(batch_size=1, prompt_tokens=prompt)
    matrices = 32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336)
    flops = prompt * (2 * matrices + 32 * 4 * 4096 * (prompt + 1) / 2)
    assert found["prefill_latency"] == pytest.approx(flops / 989.4e12 + 2 * 128256 * 4096 / 3350e9, rel=1e-4)
    assert found["prefill_throughput"] == pytest.approx(prompt / found["prefill_latency"])
    assert found["latency"] == pytest.approx(found["prefill_latency"] + 128 * found["decode_latency"])


def test_the_cache_is_read_at_each_step() -> None:
    """64 sequences of 4096 tokens: 128 KiB for each token."""
    short, long = (figures(batch_size=64, prompt_tokens=tokens, output_tokens=1) for tokens in (2048, 4096))
    assert long["decode_latency"] - short["decode_latency"] == pytest.approx(64 * 2048 * 131072 / 3350e9, rel=1e-6)


def test_more_gpus_help_less_than_in_proportion() -> None:
    one, eight = figures(H100), figures(H100, tensor=8)
    assert one["decode_latency"] / 8 < eight["decode_latency"] < one["decode_latency"]
    # Two all-reduces a layer, of which the bytes of a prompt cross 2 x 7 / 8 times.
    apart = figures(IDEAL, tensor=8)["prefill_latency"] - figures(IDEAL)["prefill_latency"] / 8
    assert apart == pytest.approx(64 * 1024 * 4096 * 2 * 2 * 7 / 8 / 450e9, rel=0.01)


def test_what_the_machine_lacks_is_refused() -> None:
    with pytest.raises(InputError, match=r"cluster\.peak_tflops is not given"):
        figures(Machine())
    with pytest.raises(InputError, match=r"cluster\.peak_tflops_fp8"):
        figures(machine_of(ClusterConfig(device="A100")), weights="fp8")


def rows(*given: dict[str, Any]) -> list[dict[str, Any]]:
    shape = {name: value for name, value in LLAMA.to_dict().items() if value is not None}
    common = {"device": "NVIDIA H100 80GB HBM3", "architecture": shape, "prompt_tokens": 1024, "output_tokens": 128}
    return [{**common, **row} for row in given]


def written(folder: Path, *given: dict[str, Any]) -> str:
    path = folder / "measured.json"
    path.write_text(json.dumps({"rows": rows(*given)}))
    return str(path)


def test_measured_points_are_met_and_lie_between(tmp_path: Path) -> None:
    """At a point what was measured comes back; between two, a factor between theirs; throughput says the same."""
    plain = {batch: figures(H100, batch_size=batch) for batch in (1, 4, 16)}
    points = [
        {"batch_size": 1, "prefill_latency": 1.5 * plain[1]["prefill_latency"], "decode_latency": 0.02},
        {"batch_size": 16, "prefill_throughput": plain[16]["prefill_throughput"] / 3, "decode_latency": 0.04},
    ]
    found = {n: figures(H100, batch_size=n, measured=written(tmp_path, *points)) for n in (1, 4, 16)}
    assert found[1]["decode_latency"] == pytest.approx(0.02) and found[16]["decode_latency"] == pytest.approx(0.04)
    assert found[1]["prefill_latency"] == pytest.approx(points[0]["prefill_latency"])
    assert found[16]["prefill_throughput"] == pytest.approx(points[1]["prefill_throughput"])
    # 4 is as far from 1 as from 16, by their logarithms: the geometric mean of the two factors.
    assert found[4]["prefill_latency"] / plain[4]["prefill_latency"] == pytest.approx((1.5 * 3) ** 0.5)
    assert found[4]["latency"] == pytest.approx(found[4]["prefill_latency"] + 128 * found[4]["decode_latency"])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"device": "NVIDIA A100-SXM4-80GB", "decode_latency": 1}, r"^serving\.measured=.* has no point for .*H100"),
        ({"weights": "fp8", "decode_latency": 1}, r"has no point for .* with weights=bf16"),
        ({"decode_latency": 1}, r"has no prefill_latency of cluster\.device=H100"),
        ({}, r"^rows\[0\]\.prefill_latency in .* is not given, nor is any other speed"),
        ({"decode_latency": -1}, r"^rows\[0\]\.decode_latency=-1 in .* must be a number above 0"),
        ({"batch_size": 0, "decode_latency": 1}, r"^rows\[0\]\.batch_size=0 in .* must be at least 1"),
        ({"architecture": {"num_layers": 1}, "decode_latency": 1}, r"^rows\[0\]\.hidden_size in .* is missing"),
    ],
)
def test_a_file_that_cannot_correct_is_refused(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        figures(H100, measured=written(tmp_path, row))


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^serving\.measured=.*nothing\.json is not a file"):
        figures(H100, measured=str(tmp_path / "nothing.json"))
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds no list `rows`"):
        figures(H100, measured=str(tmp_path / "other.json"))
    (tmp_path / "other.json").write_text("{")
    with pytest.raises(InputError, match=r"^serving\.measured=.* is not JSON"):
        figures(H100, measured=str(tmp_path / "other.json"))
