"""The verbs as functions: what each gives is what its files hold, at the recipe's layout; keys and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest

from minitron_mcore import commands
from minitron_mcore.errors import InputError
from tests.distributed.ranks import run_on_ranks

SHAPE = {
    **{"family": "llama", "num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4},
    **{"num_query_groups": 2, "vocab_size": 512, "max_position_embeddings": 64},
}
RECIPE = f"""
data: {{sequence_length: 32}}
model: {json.dumps(SHAPE)}
train: {{tokens: 1k, global_batch_size: 4, lr: 1e-3}}
importance: {{num_samples: 8}}
distill: {{tokens: 512, global_batch_size: 4, eval_interval: 2, eval_iters: 1}}
evaluate: {{samples: 8}}
"""


def the_road(home: Path, parallel: dict[str, Any]) -> dict[str, Any]:
    """From text to a Hugging Face folder, with what each function gives."""
    text, data = home / "text", home / "data" / "corpus"
    prefixes = [f"{data}_text_document", f"{data}_valid_text_document"]
    how: dict[str, Any] = {"data": {"train": prefixes[0], "valid": prefixes[1]}, "parallel": parallel}
    tokenizer: dict[str, Any] = {"model": home / "t.model", "vocab_size": 300, "extensions": [".py"]}
    commands.tokenizer(input=text, tokenizer=tokenizer)
    recipe = home / "recipe.yaml"
    made = commands.preprocess(
        input=text, output_prefix=data, tokenizer=tokenizer, preprocess={"valid_fraction": 0.2, "extensions": [".py"]}
    )
    how["tokenizer"] = {"model": home / "t.model"}
    trained = commands.train(recipe, train={"checkpoint": home / "teacher"}, **how)
    teacher = {"checkpoint": home / "teacher"}
    scores = commands.score(recipe, teacher=teacher, scores=home / "s.safetensors", **how)
    student: dict[str, Any] = {"ffn_hidden_size": 32, "num_layers": 2, "checkpoint": home / "student"}
    plan = commands.plan(recipe, scores=home / "s.safetensors", plan=home / "plan.json", student=student)
    pruned = commands.prune(recipe, teacher=teacher, plan=home / "plan.json", student=student, **how)
    distill = {"checkpoint": home / "distilled", "lr": 1e-3}
    distilled = commands.distill(recipe, teacher=teacher, student=student, distill=distill, **how)
    again = commands.distill(recipe, teacher=teacher, student=student, distill=distill, **how)
    models = {"teacher": home / "teacher", "student": home / "distilled"}
    results = commands.evaluate(recipe, checkpoints=models, output=home / "out", **how)
    prompts = {"prompts": home / "prompts.txt", "max_new_tokens": 3}
    wrote = commands.generate(
        checkpoint=home / "distilled",
        generate=prompts,
        parallel=parallel,
    )
    folder = commands.export(checkpoint=home / "distilled", hf=home / "hf", parallel=parallel)
    back = commands.import_(hf=folder, checkpoint=home / "back", parallel=parallel)
    return {
        "prefixes": (made, prefixes),
        "trained": (trained.iteration, trained.consumed_tokens),
        "ffn": scores.ffn,
        "plan": (plan.student.ffn_hidden_size, plan.layers),
        "folders": (pruned, folder, back),
        "distilled": (distilled.iteration, distilled.metrics, again.iteration, again.metrics),
        "results": results,
        "wrote": wrote,
        "inspected": commands.perform("inspect", path=home / "plan.json", json=True),
    }


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    for number in range(12):
        lines = "\n".join(f"def f{number}_{each}(x):\n    return x + {each * number}" for each in range(40))
        (tmp_path / "text" / f"{number}.py").write_text(lines)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "prompts.txt").write_text("def f\n")
    return tmp_path


def test_the_road_gives_what_its_files_hold(home: Path) -> None:
    """Every rank gets the result."""
    for found in run_on_ranks(the_road, 2, home, {"tensor": 2, "sequence": True}):
        assert sorted(found["prefixes"][0]) == sorted(found["prefixes"][1])
        assert found["trained"] == (8, 8 * 4 * 32) and found["ffn"].shape == (4, 64)
        assert found["plan"] == (32, json.loads((home / "plan.json").read_text())["layers"])
        assert [Path(each).name for each in found["folders"]] == ["student", "hf", "back"]
        iteration, metrics, *again = found["distilled"]
        assert iteration == 4 and [iteration, metrics] == again and metrics["lm loss validation"] > 1
        assert found["results"]["models"].keys() == {"teacher", "student"}
        assert found["results"]["models"]["student"]["lm loss"] == pytest.approx(metrics["lm loss validation"], rel=0.2)
        assert found["wrote"][0]["continuations"]
        assert found["results"] == json.loads((home / "out" / "results.json").read_text())


def test_keys_go_over_the_file_as_a_command_does(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    recipe = commands.recipe(
        tmp_path / "recipe.yaml",
        distill={"tokens": "94B", "hidden_states": {"sites": ("embedding",)}},
        teacher={"checkpoint": tmp_path / "t"},
        seed=7,
        **{"train.lr": 0.5, "data.valid": None},
    )
    assert (recipe.distill.tokens, recipe.distill.global_batch_size, recipe.seed) == (94 * 10**9, 4, 7)
    assert (recipe.train.lr, recipe.train.tokens) == (0.5, 1000)
    assert recipe.distill.hidden_states.sites == ["embedding"]
    assert recipe.teacher.checkpoint == str(tmp_path / "t")


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("trust: true\n")
    with pytest.raises(InputError, match="nothing is not a key of a recipe: the nearest is train"):
        commands.recipe(nothing=1)
    with pytest.raises(InputError, match=r"distill.lr=-1 must be finite and at least 0"):
        commands.recipe(distill={"lr": -1})
    with pytest.raises(InputError, match="verb=distil is not a verb"):
        commands.perform("distil")
    with pytest.raises(InputError, match=r"none\.yaml is not a file"):
        commands.recipe(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="may have a stranger's code run"):
        commands.recipe(tmp_path / "recipe.yaml")
    assert commands.recipe(tmp_path / "recipe.yaml", trust=True).trust
    with pytest.raises(InputError, match=r"hf, checkpoint are not given"):
        commands.import_()


def test_scores_are_those_of_the_file(tmp_path: Path) -> None:
    """`score` needs no process group here: random scores of a saved model."""
    from minitron_mcore.importance.scores import load_scores

    (found,) = run_on_ranks(_random_scores, 1, tmp_path)
    numpy.testing.assert_array_equal(found, load_scores(tmp_path / "s.safetensors").hidden)


def _random_scores(folder: Path) -> Any:
    import minitron_mcore.api as minitron

    minitron.save(minitron.build(SHAPE), folder / "teacher")
    keys: dict[str, Any] = {"importance": {"method": "random"}, "scores": folder / "s.safetensors"}
    return commands.score(teacher={"checkpoint": folder / "teacher"}, **keys).hidden
