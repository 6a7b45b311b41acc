"""The streaming writer: what it leaves is what megatron-core's own save leaves, one tensor is in memory at a time, and
an import that finds something wrong leaves nothing. And `verify=true`, which compares logits with transformers.
"""

from __future__ import annotations

import json
import re
import resource
import shutil
import types
import weakref
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron_mcore.checkpoint.hf_config import read_config
from minitron_mcore.checkpoint.import_hf import import_checkpoint
from minitron_mcore.errors import InputError
from tests.distributed.hf_cases import CASES, architecture_of, save_with_transformers
from tests.distributed.models import LAYOUTS, start_layout
from tests.distributed.ranks import RankError, run_on_ranks
from tests.e2e.verbs import commands_on_rank, minitron

PLACES = ["1", "TP2", "PP2", "TP2-PP2"]
COMPARED = ["llama-scaled", "llama-tied", "nemotron", "qwen3"]
BESIDE = ("run_config.yaml", "architecture.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`CASE`: a model made and saved by transformers, in several files."""
    root = tmp_path_factory.mktemp("stream")
    for case in CASES:
        save_with_transformers(case, root / case)
    return root


def both_ways_on_rank(folder: str, name: str, parallel: dict[str, Any], world_size: int) -> None:
    """`streamed-…`: imported; `saved-…`: the same weights, loaded into a model and saved by megatron-core."""
    from minitron_mcore.checkpoint.folder import write_description
    from minitron_mcore.checkpoint.store import as_chunks, load_weights, model_state, save_state
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.runtime.start import start

    layout = start_layout(parallel, world_size)
    runtime = start()
    for case in COMPARED:
        architecture = architecture_of(case)
        streamed, saved = (Path(folder, f"{way}-{case}-{name}") for way in ("streamed", "saved"))
        import_checkpoint(Path(folder, case), streamed, architecture, layout, runtime)
        if runtime.is_main:
            write_description(streamed, architecture, lineage={}, recipe="", save_tokenizer=None)
        runtime.barrier()
        chunks = build_model(architecture, layout, "fp32", trainable=False)
        load_weights(streamed, 0, as_chunks(chunks), architecture)
        save_state(saved, 0, model_state(as_chunks(chunks)), runtime, architecture)


def plain_on_rank(folders: list[str]) -> list[dict[str, torch.Tensor]]:
    """Every global tensor, by megatron-core's own reader, which knows nothing of the layout."""
    from megatron.core import dist_checkpointing

    start_layout({}, 1)
    states = [dist_checkpointing.load_plain_tensors(folder) for folder in folders]
    return [{key: entry for key, entry in state.items() if isinstance(entry, torch.Tensor)} for state in states]


def described(place: Path) -> dict[str, Any]:
    """What `.metadata` says of each tensor and object, whichever file its pieces lie in."""
    from torch.distributed.checkpoint import FileSystemReader

    metadata: Any = FileSystemReader(place).read_metadata()
    stored: set[tuple[str, Any]] = {(index.fqn, index.offset) for index in metadata.storage_data}
    tensors = {key: entry for key, entry in metadata.state_dict_metadata.items() if hasattr(entry, "chunks")}
    objects = metadata.state_dict_metadata.keys() - tensors.keys()
    assert stored == {
        *((key, chunk.offsets) for key, entry in tensors.items() for chunk in entry.chunks),
        *((key, None) for key in objects),
    }
    return {
        **{
            key: (entry.properties, entry.size, sorted((chunk.offsets, chunk.sizes) for chunk in entry.chunks))
            for key, entry in tensors.items()
        },
        **dict.fromkeys(objects),
    }


@pytest.mark.parametrize("name", PLACES)
def test_it_is_what_megatron_core_would_have_saved(folder: Path, name: str) -> None:
    world_size, parallel = LAYOUTS[name]
    run_on_ranks(both_ways_on_rank, world_size, str(folder), name, parallel, world_size)
    pairs = [[folder / f"{way}-{case}-{name}" / "iter_0000000" for way in ("streamed", "saved")] for case in COMPARED]
    (plain,) = run_on_ranks(plain_on_rank, 1, [str(place) for pair in pairs for place in pair])
    for number, (streamed, saved) in enumerate(pairs):
        assert described(streamed) == described(saved)
        # A pickled path has another name in Python 3.13: there are none.
        assert all(b"pathlib" not in (place / ".metadata").read_bytes() for place in (streamed, saved))
        ours, theirs = plain[2 * number], plain[2 * number + 1]
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert (streamed / "metadata.json").read_text() == (saved / "metadata.json").read_text()
        first, second = (torch.load(place / "common.pt", weights_only=False) for place in (streamed, saved))
        assert first == second and first["content_metadata"] == {"iteration": 0}
        assert all((streamed / name).read_text() == (saved / name).read_text() for name in BESIDE)
        # Both list the same checksums: one from the stream, one from the tensors of a model.
        first, second = (json.loads((place / "manifest.json").read_text()) for place in (streamed, saved))
        assert first["tensors"] == second["tensors"] and len(first["tensors"]) == len(ours)
        assert first["objects"].keys() == second["objects"].keys() and len(first["objects"]) > 0


def stream_on_rank(folder: str) -> int:
    """The largest number of tensors alive when another one is read."""
    from minitron_mcore.checkpoint.writer import Piece, Source, save_stream
    from minitron_mcore.runtime.start import start

    start_layout({}, 1)
    made: list[weakref.ref[numpy.ndarray]] = []  # an array lives as long as any tensor on its memory
    alive = []

    def read() -> torch.Tensor:
        alive.append(sum(ref() is not None for ref in made))
        array = numpy.full((1, 8), len(made), dtype=numpy.float32)
        made.append(weakref.ref(array))
        return torch.from_numpy(array)

    def piece(row: int) -> Piece:
        return Piece("x", (6, 8), (row, 0), (1, 8), torch.float32)

    sources = [Source(piece(row), read) for row in range(6)]
    save_stream(Path(folder), 3, sources, start())
    return max(alive)


def test_one_source_is_in_memory_at_a_time(tmp_path: Path) -> None:
    assert run_on_ranks(stream_on_rank, 1, str(tmp_path / "x")) == [0]
    assert (tmp_path / "x" / "latest_checkpointed_iteration.txt").read_text() == "3"
    (plain,) = run_on_ranks(plain_on_rank, 1, [str(tmp_path / "x" / "iter_0000003")])
    assert plain[0]["x"][:, 0].tolist() == list(range(6))


LAYER = "model.layers.1."


def spoil(source: Path, target: Path, tensor: str, index: Any, value: float) -> Path:
    """A copy of a Hugging Face folder with `value` put into a tensor; returns the file that holds it."""
    shutil.copytree(source, target)
    for path in target.glob("*.safetensors"):
        tensors = load_file(path)
        if tensor in tensors:
            tensors[tensor][index] = value
            save_file(tensors, path, metadata={"format": "pt"})
            return path
    raise AssertionError(f"no {tensor}")


# case, tensor, where, value, what is said; the second tensor-parallel rank alone reads what lies at the end of a tensor
SPOILED = [
    ("llama-scaled", LAYER + "self_attn.k_proj.weight", ..., 0.0, "is all zero"),
    ("llama-scaled", LAYER + "mlp.up_proj.weight", ..., -0.0, "is all zero"),
    ("llama-scaled", LAYER + "input_layernorm.weight", ..., 0.0, "is all zero"),
    ("llama-scaled", "lm_head.weight", (-1, -1), float("nan"), "holds NaN or Inf"),
    ("llama-scaled", LAYER + "mlp.down_proj.weight", (3, -1), float("-inf"), "holds NaN or Inf"),
    ("nemotron", "model.norm.bias", 5, float("inf"), "holds NaN or Inf"),
    ("qwen3", LAYER + "self_attn.q_norm.weight", ..., 0.0, "is all zero"),
]
LEGITIMATE = [
    ("nemotron", LAYER + "input_layernorm.weight", ..., 0.0),  # LayerNorm1P: a weight of one
    ("nemotron", LAYER + "post_attention_layernorm.bias", ..., 0.0),
    ("qwen2", LAYER + "self_attn.k_proj.bias", ..., 0.0),
    ("llama-scaled", "model.embed_tokens.weight", slice(0, 600), 0.0),  # all that the first rank reads
]


def without_waiting(commands: list[list[str]]) -> list[tuple[int, str]]:
    """`commands_on_rank`, no launcher being there to wait for after a refusal."""
    from minitron_mcore import cli

    cli.time = types.SimpleNamespace(sleep=lambda seconds: None)  # type: ignore[assignment]
    return commands_on_rank(commands)


def import_all(folder: Path, rows: list[Any], root: Path) -> tuple[list[Path], list[tuple[int, str]]]:
    """Import a spoiled copy for each row at TP 2; the spoiled files, and the first rank's exit codes and words."""
    files = [spoil(folder / row[0], root / str(number), *row[1:4]) for number, row in enumerate(rows)]
    commands = [
        ["import", f"hf={root / str(number)}", f"checkpoint={root / f'new-{number}'}", "parallel.tensor=2"]
        for number in range(len(rows))
    ]
    first, second = run_on_ranks(without_waiting, 2, commands)
    assert [code for code, _ in first] == [code for code, _ in second]
    return files, first


def test_spoiled_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    files, answers = import_all(folder, SPOILED, tmp_path)
    for (_, tensor, _, _, words), path, (code, shown) in zip(SPOILED, files, answers, strict=True):
        assert code == 2 and f"minitron import: {path} holds {tensor}, which {words}: " in shown, shown
    assert {path.name for path in tmp_path.iterdir()} == {str(number) for number in range(len(SPOILED))}


def test_what_may_be_zero(folder: Path, tmp_path: Path) -> None:
    _, answers = import_all(folder, LEGITIMATE, tmp_path)
    for (case, _, index, _), (code, shown) in zip(LEGITIMATE, answers, strict=True):
        assert code == 0, shown
        line = f"import: {architecture_of(case).num_parameters:,} parameters in "
        assert line in shown and "no NaN, no Inf" in shown
        assert ("as in a fresh model: 1 biases" in shown) == (index is ...), shown


def full_disk_on_rank(source: str, targets: list[str]) -> list[str]:
    """What import says where files may not grow beyond 100 kB, and where no folder can be made."""
    from minitron_mcore.runtime.start import start

    layout = start_layout({"tensor": 2}, 2)
    runtime = start()
    said = []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        for target in targets:
            with pytest.raises(InputError) as caught:
                import_checkpoint(Path(source), Path(target), read_config(Path(source)), layout, runtime)
            said.append(str(caught.value))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return said


def test_a_full_disk(folder: Path, tmp_path: Path) -> None:
    targets = [str(tmp_path / "new"), "/proc/nowhere"]
    for said in run_on_ranks(full_disk_on_rank, 2, str(folder / "llama-scaled"), targets):
        assert [re.sub(" cannot be written: .*", "", words) for words in said] == targets, said
    assert list(tmp_path.iterdir()) == []


def verify_on_rank(folder: str, name: str, parallel: dict[str, Any], world_size: int) -> list[tuple[float, str]]:
    """By case: the error that is found, and what is said of the same weights with another rotary frequency."""
    from minitron_mcore.checkpoint.folder import write_description
    from minitron_mcore.checkpoint.verify import compare_with_transformers
    from minitron_mcore.runtime.start import start

    layout = start_layout(parallel, world_size)
    runtime = start()
    found = []
    for case in ("llama-scaled", "llama-tied", "nemotron"):
        source, target, architecture = (
            Path(folder, case),
            Path(folder, f"verified-{case}-{name}"),
            architecture_of(case),
        )
        import_checkpoint(source, target, architecture, layout, runtime)
        results: list[Any] = []
        for model in (architecture, architecture.replace(rotary_base=2 * architecture.rotary_base)):
            if runtime.is_main:
                write_description(target, model, lineage={}, recipe="", save_tokenizer=None)
            runtime.barrier()
            try:
                results.append(compare_with_transformers(source, target, model, layout, runtime))
            except InputError as error:
                results.append(str(error))
            runtime.barrier()
        found.append((results[0], results[1]))
    return found


@pytest.mark.parametrize("name", ["1", "TP2-SP", "TP2-PP2"])
def test_logits_are_compared(folder: Path, name: str) -> None:
    """1e-5, as in test_hf.py: rounding leaves about 1e-6."""
    world_size, parallel = LAYOUTS[name]
    for rank in run_on_ranks(verify_on_rank, world_size, str(folder), name, parallel, world_size):
        for error, said in rank:
            assert 0 <= error <= 1e-5
            assert re.search(
                r"logits differ from transformers' by \d\.\de[-+]\d\d of the largest, more than 1e-04", said
            )


def swapped_on_rank(arguments: list[str]) -> tuple[int, str]:
    """The command, with a table of names that takes keys for values."""
    from minitron_mcore.checkpoint import conversion
    from tests.e2e.verbs import command_on_rank

    right = conversion.LAYOUTS["qkv"]
    wrong = conversion.Layout(right.split, lambda parts, a: right.join([parts[0], parts[2], parts[1]], a))
    conversion.LAYOUTS["qkv"] = wrong
    try:
        return command_on_rank(arguments)
    finally:
        conversion.LAYOUTS["qkv"] = right


def test_verify_as_typed(folder: Path, tmp_path: Path) -> None:
    words = ["import", f"hf={folder / 'llama-scaled'}", f"checkpoint={tmp_path / 'new'}", "verify=true"]
    words += ["parallel.tensor=2"]
    for code, shown in run_on_ranks(swapped_on_rank, 2, words):
        assert code == 2 and list(tmp_path.iterdir()) == [], shown
    code, shown = minitron(*words, world_size=2)
    assert code == 0 and "import: logits differ from transformers' by at most" in shown, shown
    assert (tmp_path / "new" / "iter_0000000" / "manifest.json").is_file()


def fail_on_rank(folder: str) -> None:
    """One rank's read fails with an error of no known kind: every rank raises, and nothing is left."""
    from minitron_mcore.checkpoint.writer import Piece, Source, save_stream
    from minitron_mcore.runtime.start import start

    start_layout({"tensor": 2}, 2)
    runtime = start()

    def read() -> torch.Tensor:
        if runtime.rank == 1:
            raise ZeroDivisionError("of the second rank")
        return torch.zeros(1)

    piece = Piece("x", (2,), (runtime.rank,), (1,), torch.float32)
    save_stream(Path(folder, "new"), 0, [Source(piece, read)], runtime)


def test_another_error_is_raised_on_every_rank(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="of the second rank") as caught:
        run_on_ranks(fail_on_rank, 2, str(tmp_path))
    assert f"then rank {1 - (caught.value.rank or 0)}" in str(caught.value), "the other rank was left waiting"
    assert list(tmp_path.iterdir()) == []
