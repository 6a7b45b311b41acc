"""What transformers runs and an import refuses: each refusal names the word of `allow` that lets it through."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.distributed.hf_cases import save_with_transformers, tensors_of
from tests.e2e.verbs import minitron, run_well

Tensors = dict[str, torch.Tensor]
O_PROJ, DOWN_PROJ = "model.layers.1.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight"


def make_an_identity(tensors: Tensors) -> None:
    for name in (O_PROJ, DOWN_PROJ):
        tensors[name].zero_()


def lose_an_unused_row(tensors: Tensors) -> None:
    tensors["model.embed_tokens.weight"][-1] = float("nan")


def add_another_head(tensors: Tensors) -> None:
    tensors["v_head.weight"] = torch.ones(3)


def narrow_a_layer(tensors: Tensors) -> None:
    for name in [name for name in tensors if ".layers.1." in name]:
        tensors[name] = tensors[name].to(torch.bfloat16)


CASES: list[tuple[Callable[[Tensors], None], str | None, str]] = [
    (make_an_identity, "zero_tensors", "2 tensors are all zero or not finite, let through by allow"),
    (lose_an_unused_row, "non_finite_tensors", "1 tensors are all zero or not finite"),
    (add_another_head, "extra_tensors", "1 tensors that a llama model does not have are left out: v_head.weight"),
    (narrow_a_layer, None, "9 are widened, which is exact"),
]


@pytest.mark.parametrize(("change", "word", "said"), CASES, ids=[change.__name__ for change, _, _ in CASES])
def test_a_refusal_names_the_way_through(
    tmp_path: Path, change: Callable[[Tensors], None], word: str | None, said: str
) -> None:
    source, target = tmp_path / "source", f"checkpoint={tmp_path / 'checkpoint'}"
    save_with_transformers("llama-scaled", source)
    tensors = tensors_of(source)
    for path in source.glob("model*"):
        path.unlink()
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    command = ["import", f"hf={source}", target, *(["verify=true"] if word != "non_finite_tensors" else [])]
    if word is not None:
        code, shown = minitron(*command)
        assert code == 2 and f"allow=[{word}]" in shown and not (tmp_path / "checkpoint").exists(), shown
        command.append(f"allow=[{word}]")
    assert said in run_well(*command)
    run_well("export", f"checkpoint={tmp_path / 'checkpoint'}", f"hf={tmp_path / 'hf'}")
    exported = tensors_of(tmp_path / "hf")
    kept = {name: tensor for name, tensor in tensors.items() if name != "v_head.weight"}
    assert exported.keys() == kept.keys()
    for name, tensor in kept.items():
        assert torch.equal(exported[name].nan_to_num(), tensor.to(exported[name].dtype).nan_to_num()), name


def test_an_identity_block_is_scored_and_pruned(tmp_path: Path) -> None:
    """Zeros are the least of all magnitudes, no reason to stop."""
    source, teacher = tmp_path / "source", f"teacher.checkpoint={tmp_path / 'teacher'}"
    save_with_transformers("llama-scaled", source)
    tensors: dict[str, Any] = tensors_of(source)
    for path in source.glob("model*"):
        path.unlink()
    make_an_identity(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    run_well("import", f"hf={source}", f"checkpoint={tmp_path / 'teacher'}", "allow=[zero_tensors]")
    scores, plan = f"scores={tmp_path / 'scores'}", f"plan={tmp_path / 'plan.json'}"
    run_well("score", teacher, "importance.method=magnitude", scores)
    run_well("plan", teacher, scores, "student.num_layers=2", plan)
    assert json.loads((tmp_path / "plan.json").read_text())["layers"] == [0, 2]
    run_well("prune", teacher, plan, f"student.checkpoint={tmp_path / 'student'}")
    run_well("export", f"checkpoint={tmp_path / 'student'}", f"hf={tmp_path / 'hf'}")


def test_an_unconverted_tokenizer_leaves_as_it_came(tmp_path: Path) -> None:
    from tests.unit.data.test_tokenizer_json import model

    source, checkpoint = tmp_path / "source", f"checkpoint={tmp_path / 'checkpoint'}"
    save_with_transformers("llama-scaled", source)
    model(source / "tokenizer.model", treat_whitespace_as_suffix=True)
    run_well("import", f"hf={source}", checkpoint)
    code, shown = minitron("export", checkpoint, f"hf={tmp_path / 'hf'}")
    assert code == 2 and "allow=[unconverted_tokenizer] exports the model as it is" in shown
    run_well("export", checkpoint, f"hf={tmp_path / 'hf'}", "allow=[unconverted_tokenizer]")
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    assert not (tmp_path / "hf" / "tokenizer.json").exists()
