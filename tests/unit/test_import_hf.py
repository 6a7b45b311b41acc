"""What a config.json is refused for before anything is read of its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minitron_mcore.checkpoint.hf_config import read_config
from minitron_mcore.errors import InputError


def test_quantized_weights_are_refused_by_name(tmp_path: Path) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"has a quantization_config: .* dequantize the model first"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    assert read_config(tmp_path).family == "llama"
