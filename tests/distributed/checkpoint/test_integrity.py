"""`verify`: a byte that is changed in any tensor of any kind of checkpoint is found, its file and tensor named.

The place of a tensor's bytes in a file is looked for by their value, with no help of the code under test.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minitron_mcore.checkpoint.export import export_checkpoint
from minitron_mcore.checkpoint.folder import is_hugging_face
from minitron_mcore.checkpoint.hf_config import read_config
from minitron_mcore.checkpoint.import_hf import import_checkpoint
from minitron_mcore.checkpoint.integrity import Verification, verify_checkpoint, verify_hugging_face
from minitron_mcore.checkpoint.manifest import MANIFEST
from minitron_mcore.errors import InputError
from tests.distributed.hf_cases import alone, architecture_of, save_with_transformers
from tests.distributed.models import start_layout, steady, tiny
from tests.distributed.ranks import run_on_ranks
from tests.e2e.verbs import minitron

CASE = "llama-scaled"
KINDS = ["imported", "trained", "exported"]


def verify(folder: Path) -> Verification:
    return verify_hugging_face(folder) if is_hugging_face(folder) else verify_checkpoint(folder)


def import_on_rank(source: str, target: str) -> None:
    from minitron_mcore.checkpoint.folder import write_description
    from minitron_mcore.runtime.start import start

    layout = start_layout({"tensor": 2}, 2)
    architecture, runtime = read_config(Path(source)), start()
    import_checkpoint(Path(source), Path(target), architecture, layout, runtime)
    if runtime.is_main:
        write_description(Path(target), architecture, lineage={}, recipe="name: x\n", save_tokenizer=None)


def train_on_rank(folder: str) -> None:
    """A checkpoint with its optimizer, on two stages."""
    from minitron_mcore.checkpoint.folder import write_description
    from minitron_mcore.checkpoint.store import save_state, training_state
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import initialize
    from minitron_mcore.runtime.start import start
    from minitron_mcore.training.config import TrainConfig
    from minitron_mcore.training.step import build_optimizer, build_scheduler, wrap_model

    layout = start_layout({"pipeline": 2}, 2)
    runtime, architecture = start(), tiny("nemotron")
    models = build_model(architecture, layout, "bf16")
    initialize(models, architecture, seed=11)
    chunks = wrap_model(models)
    optimizer = build_optimizer(chunks, TrainConfig(), "bf16")
    scheduler = build_scheduler(optimizer, TrainConfig(), steady(TrainConfig(), 10))
    for chunk in chunks:  # or weights and moments are zeros, which also lie between tensors
        for tensor in chunk.parameters():
            tensor.main_grad.normal_()  # type: ignore[attr-defined]
            tensor.data.normal_()
    optimizer.reload_model_params()
    optimizer.step()
    target = Path(folder)
    if runtime.is_main:
        write_description(target, architecture, lineage={}, recipe="name: x\n", save_tokenizer=None)
    save_state(target, 7, training_state(chunks, optimizer, scheduler, {}, is_loading=False), runtime)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("integrity")
    save_with_transformers(CASE, root / "theirs")
    run_on_ranks(import_on_rank, 2, str(root / "theirs"), str(root / "imported"))
    run_on_ranks(train_on_rank, 2, str(root / "trained"))
    export_checkpoint(root / "imported", 0, root / "exported", alone(), max_shard_bytes=400_000)
    return root


def place_of(root: Path, kind: str) -> Path:
    return root / kind / {"imported": "iter_0000000", "trained": "iter_0000007", "exported": ""}[kind]


def pieces(place: Path) -> list[tuple[Path, str, int, bytes]]:
    """(file, tensor, where its part of the file begins, the bytes of the tensor) of every stored piece."""
    found = []
    for path in sorted(place.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            found.append((path, name, 0, tensor.view(torch.uint8).numpy().tobytes()))
    if found:
        return found
    from torch.distributed.checkpoint import FileSystemReader

    for index, info in (FileSystemReader(place).read_metadata().storage_data or {}).items():
        path = place / info.relative_path
        with path.open("rb") as stream:
            stream.seek(info.offset)
            content = stream.read(info.length)
        with open(place / "piece", "wb") as stream:
            stream.write(content)
        value = torch.load(place / "piece", weights_only=True)
        if isinstance(value, torch.Tensor):  # else an object, which counts as it is stored
            content = value.flatten().view(torch.uint8).numpy().tobytes()
        found.append((path, index.fqn, info.offset, content))
    (place / "piece").unlink()
    return found


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 0x10]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_byte_in_any_tensor(root: Path, kind: str) -> None:
    place = place_of(root, kind)
    whole = verify(root / kind)
    assert (whole.faults, whole.notes) == ([], [])
    stored = pieces(place)
    tensors = [(name, len(content)) for _, name, _, content in stored if "_extra_state" not in name]
    assert whole.num_bytes == sum(size for _, size in tensors)
    assert len(whole.keys) == len({name for name, _ in tensors})
    assert kind != "trained" or any(name.startswith("optimizer.") for _, name, _, _ in stored)
    assert len({path for path, *_ in stored}) > 1
    # One piece of every tensor in every file.
    for path, name, start, content in {(row[0], row[1]): row for row in stored}.values():
        position = path.read_bytes().index(content, start) + len(content) * 2 // 3
        flip(path, position)
        faults = verify(root / kind).faults
        flip(path, position)
        assert len(faults) == 1 and faults[0].startswith(f"{path}: {name}"), (name, faults)
        assert "has changed since it was written" in faults[0]
    assert verify(root / kind).faults == []


@pytest.mark.parametrize("kind", KINDS)
def test_other_damage(root: Path, kind: str, tmp_path: Path) -> None:
    """Every file in turn cut off, changed where it is small, and taken away: the file is named."""
    names = [path.relative_to(place_of(root, kind)) for path in place_of(root, kind).rglob("*") if path.is_file()]
    assert MANIFEST in map(str, names) and len(names) > 4
    for name in names:
        for damage in ("cut", "gone", "flip"):
            shutil.copytree(root / kind, tmp_path / "copy")
            path = tmp_path / "copy" / place_of(root, kind).relative_to(root / kind) / name
            if damage == "cut":
                os.truncate(path, path.stat().st_size - 1)
            elif damage == "gone":
                path.unlink()
            elif path.suffix not in (".distcp", ".safetensors"):  # those are above
                flip(path, path.stat().st_size // 2)
            try:
                result = verify(tmp_path / "copy")
                said = result.faults if str(name) != MANIFEST or damage != "gone" else result.notes
            except InputError as error:  # the newest iteration cannot be told any more
                assert str(name) == "metadata.json" and damage == "gone"
                said = [str(error)]
            shutil.rmtree(tmp_path / "copy")
            if damage == "flip" and path.suffix in (".distcp", ".safetensors"):
                assert said == []
            elif str(name) == MANIFEST and damage == "cut":
                assert said == [], "its last byte is a line's end"
            elif str(name) != MANIFEST:
                assert any(str(path) in words or str(path.parent) in words for words in said), (name, damage, said)
            else:
                assert said, (name, damage)


def test_without_a_manifest(root: Path, tmp_path: Path) -> None:
    """Somebody else's folder: its tensors are read, and that they were compared with nothing is said."""
    shutil.copytree(root / "theirs", tmp_path / "theirs")
    shutil.copytree(root / "imported", tmp_path / "older")
    (tmp_path / "older" / "iter_0000000" / MANIFEST).unlink()
    for kind in ("theirs", "older"):
        result = verify(tmp_path / kind)
        assert result.faults == [] and len(result.keys) >= 9 and result.num_bytes > 1_000_000
        assert len(result.notes) == 1 and "has no manifest.json" in result.notes[0]
    path = tmp_path / "older" / "iter_0000000" / "__1_0.distcp"
    os.truncate(path, path.stat().st_size // 2)
    faults = verify(tmp_path / "older").faults
    assert faults and all(fault.startswith(f"{path} is damaged: ") for fault in faults)
    path.unlink()
    assert verify(tmp_path / "older").faults == [f"{path} is missing, though .metadata names it"]


def test_as_typed(root: Path, tmp_path: Path) -> None:
    for kind in ("imported", "exported"):
        code, shown = minitron("inspect", str(root / kind), "verify=true")
        assert code == 0, shown
        shutil.copytree(root / kind, tmp_path / kind)
        path, name, start, content = pieces(place_of(tmp_path, kind))[3]
        flip(path, path.read_bytes().index(content, start) + 5)
        code, shown = minitron("inspect", str(tmp_path / kind), "verify=true")
        assert code == 2 and f"{path}: {name}" in shown, shown


def test_the_manifest_is_of_no_account_to_transformers(root: Path) -> None:
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(root / "exported", output_loading_info=True)
    model, info = loaded
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(tensor.numel() for tensor in model.parameters()) == architecture_of(CASE).num_parameters
