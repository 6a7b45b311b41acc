"""What a config.json is refused for before anything is read of its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minitron_mcore.checkpoint.hf_config import find_hugging_face, read_config
from minitron_mcore.errors import InputError
from tests.refusals import refuses


def test_quantized_weights_are_refused_by_name(tmp_path: Path) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"has a quantization_config, .*: dequantize the model first"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    assert read_config(tmp_path).family == "llama"


def test_what_is_no_folder_is_said_how_to_become_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert find_hugging_face(tmp_path) == tmp_path
    hub = "meta-llama/Llama-3.1-8B"
    with refuses("hf", hub, "is not a folder here", f"`hf download {hub} --local-dir DIR`, then give hf=DIR"):
        find_hugging_face(hub)
    with refuses("hf", tmp_path / "model.safetensors", "is a file", f"hf={tmp_path}"):
        find_hugging_face(tmp_path / "model.safetensors")
    for other in ("../a/b", "/a/b", "a", "a/b/c"):
        with refuses("hf", other, "is not there"):
            find_hugging_face(other)
