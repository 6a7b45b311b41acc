"""A folder of weights alone, in and out and pruned by magnitude, as typed."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.distributed.hf_cases import save_with_transformers, tensors_of
from tests.e2e.verbs import run_well


def test_weights_without_a_tokenizer(tmp_path: Path) -> None:
    """They leave as they came, with a warning; so does what was pruned from them, of its own shape."""
    from transformers import AutoModelForCausalLM

    source = tmp_path / "source"
    save_with_transformers("llama-scaled", source)
    config = json.loads((source / "config.json").read_text())
    config.pop("eos_token_id", None)
    (source / "config.json").write_text(json.dumps({**config, "bos_token_id": 5}))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "generation_config.json").unlink(missing_ok=True)
    assert "holds no tokenizer" in run_well("import", f"hf={source}", f"checkpoint={tmp_path / 'teacher'}")
    scores, teacher = f"scores={tmp_path / 'scores'}", f"teacher.checkpoint={tmp_path / 'teacher'}"
    run_well("score", teacher, "importance.method=magnitude", scores)
    run_well("prune", teacher, scores, "student.ffn_hidden_size=96", f"student.checkpoint={tmp_path / 'student'}")
    for name in ("teacher", "student"):
        shown = run_well("export", f"checkpoint={tmp_path / name}", f"hf={tmp_path / name}-hf")
        assert f"WARNING: {tmp_path / name} has no tokenizer" in shown
    whole, again = (tensors_of(path) for path in (source, tmp_path / "teacher-hf"))
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    assert {path.name for path in (tmp_path / "teacher-hf").iterdir()} == {
        *(
            "config.json",
            "generation_config.json",
            "README.md",
            "manifest.json",
            "model.safetensors",
            "chat_template.jinja",
        )
    }
    written = json.loads((tmp_path / "teacher-hf" / "config.json").read_text())
    assert written["bos_token_id"] == 5 and "eos_token_id" not in written
    assert "AutoTokenizer" not in (tmp_path / "teacher-hf" / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "student-hf").config.intermediate_size == 96
