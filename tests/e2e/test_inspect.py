"""`inspect` as typed, on what the verbs and transformers make, and on damaged copies of it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import yaml

from minitron_mcore.data.tokenizer import load_tokenizer
from minitron_mcore.importance.scores import Scores, save_scores
from minitron_mcore.pruning.plan_file import save_plan
from tests.distributed.foreign_models import LLAMA, arguments, save_foreign
from tests.distributed.hf_cases import architecture_of, save_with_transformers, tensors_of
from tests.distributed.ranks import run_on_ranks
from tests.plans import make_plan
from tests.unit.text_data import small_tokenizer

CASE = "llama-scaled"
FIRST_FILE, INDEX = "model-00001-of-", "model.safetensors.index.json"


def all_typed(commands: list[list[str]]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each command. Runs in a worker."""
    from minitron_mcore.cli import main

    results = []
    for words in commands:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(words)
        results.append((code, out.getvalue(), err.getvalue()))
    return results


def minitron(*commands: list[str]) -> list[tuple[int, str, str]]:
    return run_on_ranks(all_typed, 1, list(commands))[0]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded Hugging Face folder `hf` with a tokenizer, its checkpoint, scores and a plan."""
    root = tmp_path_factory.mktemp("inspect")
    save_with_transformers(CASE, root / "hf")
    small_tokenizer(root / "hf" / "tokenizer.model")
    ((code, _, shown),) = minitron(["import", f"hf={root / 'hf'}", f"checkpoint={root / 'checkpoint'}"])
    assert code == 0, shown
    a = architecture_of(CASE)
    random = numpy.random.default_rng(3)
    shapes = {
        "hidden": (a.hidden_size,),
        "ffn": (a.num_layers, a.ffn_hidden_size),
        "heads": (a.num_layers, a.num_attention_heads),
        "layers": (a.num_layers,),
    }
    arrays: dict[str, Any] = {axis: random.random(shape) for axis, shape in shapes.items()}
    scores = Scores(architecture=a, settings={"data": "x"}, **arrays)
    save_scores(scores, root / "scores.safetensors")
    save_plan(make_plan(scores, {"hidden_size": 48}), root / "plan.json")
    return root


def listing(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_what_each_is(root: Path) -> None:
    """Parameters against transformers' own tensors; both forms of the command; nothing is written."""
    parameters = sum(tensor.numel() for tensor in tensors_of(root / "hf").values())
    before = listing(root)
    names = ("hf", "checkpoint", "scores.safetensors", "plan.json")
    answers = minitron(*(["inspect", f"path={root / name}", "json=true"] for name in names))
    assert [code for code, _, _ in answers] == [0] * 4, answers
    hf, checkpoint, scores, plan = (json.loads(shown) for _, shown, _ in answers)
    assert [found["kind"] for found in (hf, checkpoint, scores, plan)] == [
        "hugging_face",
        "checkpoint",
        "scores",
        "plan",
    ]
    assert [found["parameters"] for found in (hf, checkpoint, scores, plan["teacher"])] == [parameters] * 4
    assert hf["dtypes"] == checkpoint["dtypes"] == ["float32"]
    assert hf["files"] == len(list((root / "hf").glob("*.safetensors"))) > 1
    assert (hf["architecture"]["padded_vocab_size"], checkpoint["architecture"]["padded_vocab_size"]) == (1003, 1024)
    assert checkpoint["architecture"] == json.loads(json.dumps(architecture_of(CASE).to_dict()))
    assert (checkpoint["iterations"], checkpoint["newest_finished"], checkpoint["unfinished"]) == ([0], 0, [])
    assert (checkpoint["lineage"]["stage"], checkpoint["saved_at"]["tensor"]) == ("import", 1)
    fingerprint = load_tokenizer(str(root / "hf" / "tokenizer.model")).fingerprint
    assert hf["tokenizer"]["fingerprint"] == checkpoint["tokenizer"]["fingerprint"] == fingerprint
    assert (scores["lineage"], scores["scores"]["ffn"]["shape"]) == ({"data": "x"}, [3, 136])
    assert (plan["student"]["architecture"]["hidden_size"], plan["kept_layers"]) == (48, [0, 1, 2])

    for name, (code, shown, _) in zip(names, minitron(*(["inspect", str(root / name)] for name in names)), strict=True):
        assert code == 0 and shown.startswith(f"{root / name}: ") and f"{parameters:,}" in shown, shown
    assert listing(root) == before


def test_leftovers_are_named(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "123"  # a name that is a number to YAML
    shutil.copytree(root / "checkpoint", folder)
    shutil.copytree(folder / "iter_0000000", folder / ".unfinished_iter_0000007")
    shutil.copytree(folder / "iter_0000000", folder / "iter_0000005")
    (code, shown, _), (_, table, _) = minitron(["inspect", str(folder), "json=true"], ["inspect", str(folder)])
    found = json.loads(shown)
    assert code == 0 and (found["iterations"], found["newest_finished"]) == ([0, 5], 0)
    assert found["unfinished"] == [".unfinished_iter_0000007"]
    assert any("iteration 5 is ignored" in warning for warning in found["warnings"])
    assert "WARNING: .unfinished_iter_0000007 is left over" in table


def test_one_iteration_may_be_named(root: Path, tmp_path: Path) -> None:
    """Within its checkpoint it has the lineage; copied alone it is described as far as it goes."""
    place = root / "checkpoint" / "iter_0000000"
    whole, one = (
        json.loads(shown)
        for _, shown, _ in minitron(*(["inspect", str(p), "--json"] for p in (root / "checkpoint", place)))
    )
    for name in ("kind", "architecture", "dtypes", "stored_bytes", "lineage", "tokenizer", "files", "written_by_ranks"):
        assert one[name] == whole[name], name
    assert (one["iterations"], one["files"], one["written_by_ranks"]) == ([0], 1, 1)
    shutil.copytree(place, tmp_path / "iter_0000000")
    ((_, shown, _),) = minitron(["inspect", str(tmp_path / "iter_0000000"), "--json"])
    assert json.loads(shown)["architecture"] == whole["architecture"]


def write_foreign(folder: str) -> None:
    save_foreign(folder, arguments(**LLAMA), {"tensor": 2}, 2)


def test_checkpoints_of_other_projects(tmp_path: Path) -> None:
    """What is not known of them is said to be unknown; the layout shows in the files."""
    run_on_ranks(write_foreign, 2, str(tmp_path / "foreign"))
    for path in (tmp_path / "foreign", tmp_path / "foreign" / "iter_0000100"):
        (code, shown, said), (_, table, _) = minitron(
            ["inspect", str(path), "--json", "--verify"], ["inspect", str(path)]
        )
        assert code == 0, said
        found = json.loads(shown)
        assert (found["kind"], found["newest_finished"], found["written_by_ranks"]) == ("megatron", 100, 2)
        assert found["described_by"].endswith("common.pt") and found["architecture"]["hidden_size"] == 48
        assert found["lineage"] == {} and found["tokenizer"] is None
        assert found["verified"]["tensors"] > 0 and not found["verified"]["faults"]
        assert any("manifest.json" in warning for warning in found["warnings"]), "compared with nothing"
        assert table.startswith(f"{path}: Megatron checkpoint of another project\n")
        assert any(line.split() == ["lineage", "unknown"] for line in table.splitlines())


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def test_verify_finds_changed_bytes(root: Path, tmp_path: Path) -> None:
    """Faults one a line below the table, and exit code 2 with the first; without --verify they are not seen."""
    ((code, _, said),) = minitron(["export", f"checkpoint={root / 'checkpoint'}", f"hf={root / 'exported'}"])
    assert code == 0, said
    for name in ("checkpoint", "exported"):
        shutil.copytree(root / name, tmp_path / name)
    whole = [["inspect", str(tmp_path / name), "--verify"] for name in ("checkpoint", "exported")]
    for code, shown, said in minitron(*whole):
        assert code == 0 and "\nfault: " not in shown and not said, (shown, said)
        assert shown.split("verified\n")[1].split()[:2] in (["tensors", "9"], ["tensors", "30"])
    weights = next((tmp_path / "checkpoint" / "iter_0000000").glob("*.distcp"))
    flip(weights, 0.5)
    flip(tmp_path / "exported" / "model.safetensors", 1.0)
    flip(tmp_path / "exported" / "tokenizer.model", 1.0)
    for (code, shown, said), path, count in zip(
        minitron(*whole), (weights, tmp_path / "exported"), (1, 2), strict=True
    ):
        faults = [line for line in shown.splitlines() if line.startswith("fault: ")]
        assert code == 2 and len(faults) == count and str(path) in faults[0], shown
        assert said == f"minitron inspect: {said.split(': ')[1]}: {faults[0].removeprefix('fault: ')}\n"
        assert f"is damaged, {count} fault{'s' if count > 1 else ''}: " in said
    ((code, shown, _),) = minitron([*whole[1], "--json"])
    assert code == 2 and len(json.loads(shown)["verified"]["faults"]) == 2
    assert [code for code, _, _ in minitron(*(words[:2] for words in whole))] == [0, 0]


def test_flags_are_of_inspect_alone(root: Path) -> None:
    plan = str(root / "plan.json")
    answers = minitron(
        ["inspect", "--verify", plan, "--json"],
        ["--json", "inspect", plan],
        ["plan", "--json"],
        ["import", "--verify", f"hf={root / 'hf'}"],
    )
    assert [code for code, _, _ in answers] == [0, 0, 2, 2], answers
    found = json.loads(answers[0][1])
    assert found["warnings"][-1] == "verify=true has no effect: only folders of weights have checksums"
    assert json.loads(answers[1][1])["warnings"] == found["warnings"][:-1]
    assert answers[2][2].startswith("minitron plan: --json is a flag of inspect alone")
    assert answers[3][2].startswith("minitron import: --verify is a flag of inspect alone")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def damaged(root: Path, folder: Path) -> dict[str, Path]:
    """What must be said -> what is damaged."""

    def copy(name: str, source: str) -> Path:
        shutil.copytree(root / source, folder / name)
        return folder / name

    def changed(name: str, **change: Any) -> Path:
        path = copy(name, "checkpoint")
        fields = yaml.safe_load((path / "architecture.yaml").read_text())
        (path / "architecture.yaml").write_text(yaml.safe_dump({**fields, **change}))
        return path

    found = {"linear_fc1.weight of shape (3, 272, 96), but": changed("other-ffn", ffn_hidden_size=134)}
    found[" of shape (3, 96), but num_layers=2 in"] = changed("fewer-layers", num_layers=2)
    found["holds no decoder.layers.self_attention.linear_qkv.layer_norm_bias"] = changed(
        "other-norm", normalization="LayerNorm"
    )
    for words, name in {"is cut off: it has": "short", "though .metadata names it": "gone"}.items():
        found[words] = copy(name, "checkpoint")
        file = max((found[words] / "iter_0000000").glob("*.distcp"), key=lambda path: path.stat().st_size)
        cut(file) if name == "short" else file.unlink()
    found["has no readable .metadata"] = copy("metadata", "checkpoint")
    cut(found["has no readable .metadata"] / "iter_0000000" / ".metadata")
    found["names iteration 9, but"] = copy("tracker", "checkpoint")
    (found["names iteration 9, but"] / "latest_checkpointed_iteration.txt").write_text("9")
    found["it holds .unfinished_iter_0000000"] = copy("unfinished", "checkpoint")
    path = found["it holds .unfinished_iter_0000000"]
    (path / "latest_checkpointed_iteration.txt").unlink()
    (path / "iter_0000000").rename(path / ".unfinished_iter_0000000")
    found["that the checkpoint's tokenizer is"] = copy("tokenizer", "checkpoint")
    (found["that the checkpoint's tokenizer is"] / "tokenizer" / "tokenizer.model").unlink()
    small_tokenizer(found["that the checkpoint's tokenizer is"] / "tokenizer" / "tokenizer.model", vocab_size=500)

    for words, name in {"is not a whole safetensors": "hf-short", f"though {INDEX} names it": "hf-gone"}.items():
        found[words] = copy(name, "hf")
        file = next(found[words].glob(FIRST_FILE + "*"))
        cut(file) if name == "hf-short" else file.unlink()
    found["holds no tensor model.norm.weight, which its config.json"] = copy("hf-index", "hf")
    index = found["holds no tensor model.norm.weight, which its config.json"] / INDEX
    listed = json.loads(index.read_text())
    del listed["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(listed))
    found["but config.json means"] = copy("hf-config", "hf")
    config = found["but config.json means"] / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": 134}))
    found["its weight_map must name a file for each tensor"] = copy("hf-list", "hf")
    (found["its weight_map must name a file for each tensor"] / INDEX).write_text('{"weight_map": []}')
    found["holds no config.json"] = copy("hf-bare", "hf")
    (found["holds no config.json"] / "config.json").unlink()
    return found


def test_damage_and_strangers_are_refused(root: Path, tmp_path: Path) -> None:
    """Exit code 2 and one sentence each, on stderr; nothing is written."""
    cases = damaged(root, tmp_path)
    for name, told in {"scores.safetensors": "cannot be read", "plan.json": "plan.json"}.items():
        cases[told] = tmp_path / name
        shutil.copy(root / name, tmp_path)
        cut(tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("something of the user's")
    (tmp_path / "nothing").touch()
    cases["nowhere is not there"] = tmp_path / "nowhere"
    cases["empty is not recognised: name a checkpoint, a Hugging Face folder"] = tmp_path / "empty"
    cases["notes.txt is not recognised"] = tmp_path / "notes.txt"
    cases["nothing is not recognised"] = tmp_path / "nothing"
    cases["is not a scores file"] = next((root / "hf").glob(FIRST_FILE + "*"))
    before = listing(tmp_path)
    commands = [["inspect", str(path)] for path in cases.values()]
    answers = minitron(*commands, ["inspect"], ["inspect", "a", "b"])
    words = [*cases, "path is not given", "a is not an override"]
    for word, (code, shown, said) in zip(words, answers, strict=True):
        assert code == 2 and not shown and said.startswith("minitron inspect: ") and said.count("\n") == 1, (word, said)
        assert word in said, (word, said)
    assert listing(tmp_path) == before
