"""A stranger's checkpoint is read without running what lies in it, whichever way it is read.

The checkpoint is written by torch alone; its pickles are then replaced by ones that make a folder when they are loaded.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from enum import Enum
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from megatron.core.transformer.enums import AttnBackend
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import WriteItemType

from minitron_mcore import cli
from minitron_mcore.architecture import build_architecture
from minitron_mcore.checkpoint.folder import (
    TRACKER,
    find_checkpoint,
    finish_iteration,
    iteration_folder,
    read_architecture,
)
from minitron_mcore.checkpoint.inspection import inspect_checkpoint
from minitron_mcore.checkpoint.reader import TensorReader
from minitron_mcore.checkpoint.stated import Stated, stating
from minitron_mcore.checkpoint.store import load_state, load_weights
from minitron_mcore.checkpoint.unpickle import read_common, read_metadata
from minitron_mcore.errors import InputError
from minitron_mcore.jobs.inputs import output_folder
from minitron_mcore.layout import parameter_table
from minitron_mcore.report.what_it_is import describe

ARCHITECTURE = build_architecture(
    {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 12, "num_attention_heads": 2, "vocab_size": 16}
)
ARGUMENTS = {
    "num_layers": 2,
    "hidden_size": 8,
    "ffn_hidden_size": 12,
    "num_attention_heads": 2,
    "vocab_size": 16,
    "max_position_embeddings": 32,
    "normalization": "RMSNorm",
    "swiglu": True,
    "untie_embeddings_and_output_weights": True,
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "use_rope_scaling": False,
    "apply_layernorm_1p": False,
    "norm_epsilon": 1e-5,
    "exit_signal": signal.SIGTERM,
}


class Evil:
    """Makes the folder `marker` when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.makedirs, (str(self.marker), 0o777, True)


def tensors() -> dict[str, torch.Tensor]:
    """What the architecture consists of, by stored name; layers stacked."""
    shapes = {
        parameter.key: ((2,) if parameter.per_layer else ()) + parameter.shape(ARCHITECTURE)
        for parameter in parameter_table(ARCHITECTURE)
    }
    generator = torch.Generator().manual_seed(1)
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "checkpoint" / "iter_0000005"
    place.mkdir(parents=True)
    checkpoint.save(tensors(), checkpoint_id=place, no_dist=True)
    torch.save(COMMON, place / "common.pt")
    (place / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (place.parent / TRACKER).write_text("5")
    return place.parent


def read_all(folder: Path) -> Any:
    reader = TensorReader(folder, 5)
    reader.check(ARCHITECTURE, "architecture.yaml")
    wanted = [(parameter, 1 if parameter.per_layer else None) for parameter in parameter_table(ARCHITECTURE)]
    return {(each.key, layer): reader.read_part(each, ARCHITECTURE, layer, 1, 2) for each, layer in wanted}


WAYS_IN: dict[str, Callable[[Path], Any]] = {
    "TensorReader": lambda folder: TensorReader(folder, 5),
    "read_part": read_all,
    "load_weights": lambda folder: load_weights(folder, 5, [], ARCHITECTURE),
    "load_state": lambda folder: load_state(folder, 5, {}),
    "inspect": inspect_checkpoint,
    "read_architecture": read_architecture,
}


COMMON = {"args": argparse.Namespace(**ARGUMENTS), "iteration": 5}
OBJECT = "__0_0.distcp (common_state/shard_0_1)"  # as it is said where the common part lies among the tensors
PLACES = [".metadata", "common.pt", OBJECT]


def put_common(folder: Path, common: Any, name: str) -> None:
    """The common part, as its own file or, as from megatron-core 0.19 on, as an object among the tensors."""
    place = folder / "iter_0000005"
    if name == "common.pt":
        torch.save(common, place / name)
        return
    (place / "common.pt").unlink(missing_ok=True)
    save_plainly({**tensors(), "common_state/shard_0_1": [common]}, place)


def save_plainly(state: dict[str, Any], place: Path) -> None:
    """As megatron-core does: an object remains one, whatever it consists of."""
    planner = checkpoint.DefaultSavePlanner(flatten_state_dict=False)
    checkpoint.save(state, checkpoint_id=place, planner=planner, no_dist=True)


def put_evil(folder: Path, name: str, marker: Path) -> None:
    """Replace one of the two pickles by the same content and an Evil."""
    path = folder / "iter_0000005" / name
    if name != ".metadata":
        put_common(folder, {**COMMON, "evil": Evil(marker)}, name)
        return
    metadata = pickle.loads(path.read_bytes())
    metadata.planner_data = {"evil": Evil(marker)}
    path.write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("way", WAYS_IN)
@pytest.mark.parametrize("name", PLACES)
def test_nothing_is_run(folder: Path, tmp_path: Path, way: str, name: str) -> None:
    marker = tmp_path / "marker"
    put_evil(folder, name, marker)
    with pytest.raises(
        InputError, match=rf"iter_0000005/{re.escape(name)} asks for os\.makedirs, .* may run code: set trust=true"
    ):
        WAYS_IN[way](folder)
    assert not marker.exists()


@pytest.mark.parametrize("name", PLACES)
def test_trusted_files_are_read(folder: Path, tmp_path: Path, name: str) -> None:
    """And run what lies in them: the Evil above is one."""
    marker = tmp_path / "marker"
    put_evil(folder, name, marker)
    with stating(Stated(trust=True)):
        part = read_all(folder)["output_layer.weight", None]
    assert marker.is_dir() and torch.equal(part, tensors()["output_layer.weight"][64:])
    with pytest.raises(InputError, match="set trust=true"), stating(Stated(trust=False)):
        read_all(folder)


def test_the_recipes_key_is_what_trusts(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As typed; the process group, which this needs none of, is left out."""
    runtime = argparse.Namespace(
        on_main=lambda work: work(), print=print, warn=lambda words: None, watched=lambda watch: nullcontext()
    )
    monkeypatch.setattr("minitron_mcore.runtime.start.start", lambda: runtime)
    monkeypatch.setattr("minitron_mcore.runtime.start.stop", lambda: None)
    put_evil(folder, ".metadata", tmp_path / "marker")
    assert cli.main(["inspect", str(folder)]) == 2 and not (tmp_path / "marker").exists()
    assert "set trust=true if you trust where it comes from" in capsys.readouterr().err
    assert cli.main(["inspect", str(folder), "trust=true"]) == 0 and (tmp_path / "marker").is_dir()


@pytest.mark.parametrize("name", PLACES[1:])
def test_every_way_in_reads_what_is_harmless(folder: Path, name: str) -> None:
    put_common(folder, COMMON, name)
    whole = tensors()
    assert read_architecture(folder) == ARCHITECTURE.replace(
        rotary_base=10000.0, max_position_embeddings=32, padded_vocab_size=128
    )
    reader, parts = TensorReader(folder, 5), read_all(folder)
    for parameter in parameter_table(ARCHITECTURE):
        layer = 1 if parameter.per_layer else None
        expected = whole[parameter.key] if layer is None else whole[parameter.key][layer]
        assert torch.equal(reader.read(parameter.key, layer, parameter.shape(ARCHITECTURE)), expected)
        # Rank 1 of 2: the second half of the sharded axis; of the gate's part and of the up part where it is gated.
        pieces = expected.chunk(2) if parameter.gated else [expected]
        if parameter.shard_axis is not None:
            expected = torch.cat([piece.chunk(2, dim=parameter.shard_axis)[1] for piece in pieces])
        assert torch.equal(parts[parameter.key, layer], expected)


@pytest.mark.parametrize(
    "code",
    [
        b"cbuiltins\neval\n(V1\ntR.",
        b"cos\nsystem\n(Vtrue\ntR.",
        b"ctorch\nload\n(Vx\ntR.",
        b"ctorch\nnn\n.",
        b"\x80\x04\x8c\x05torch\x8c\x10serialization.os\x93.",
        b"\x80\x04\x8c\x13torch.serialization\x8c\x17_get_layout.__globals__\x93.",
        b"cfunctools\npartial\n.",
        b"coperator\nattrgetter\n.",
        b"cbuiltins\ngetattr\n(ctorch.distributed.checkpoint.metadata\nMetadata\nV__init__\ntR.",
    ],
)
def test_only_a_checkpoints_own_classes_are_admitted(tmp_path: Path, code: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(code)
    with pytest.raises(InputError, match=r"asks for [\w.]+, which no checkpoint needs and which may run code"):
        read_metadata(tmp_path)


@pytest.mark.parametrize("place", ["../other/__0_0.distcp", "/etc/passwd", "inner/__0_0.distcp"])
def test_files_elsewhere_are_not_read(folder: Path, place: str) -> None:
    path = folder / "iter_0000005" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = place
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(InputError, match="a checkpoint's files lie beside it"):
        TensorReader(folder, 5)


def test_an_object_in_a_tensors_place(folder: Path) -> None:
    """torch unpickles an object without restriction where its `.metadata` names one under a tensor's name."""
    path = folder / "iter_0000005" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.state_dict_metadata["output_layer.weight"] = BytesStorageMetadata()
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(InputError, match=r"the pickled object output_layer\.weight, .* may run code"):
        load_state(folder, 5, {})
    with pytest.raises(InputError, match=r"holds no output_layer\.weight"):
        read_all(folder)


def damaged_metadata(whole: bytes) -> Iterator[bytes]:
    """Each of another part that is not there, or is of another kind; the pickle itself is well."""

    def changed(change: Callable[[Metadata, Any, Any], Any]) -> bytes:
        metadata = pickle.loads(whole)
        index = next(index for index in metadata.storage_data if index.fqn == "output_layer.weight")
        change(metadata, metadata.state_dict_metadata["output_layer.weight"], index)
        return pickle.dumps(metadata)

    yield changed(lambda metadata, _, index: delattr(metadata.storage_data[index], "length"))
    yield changed(lambda metadata, _, index: setattr(metadata.storage_data[index], "offset", "far"))
    yield changed(lambda metadata, _, index: setattr(metadata.storage_data[index], "offset", -1))
    yield changed(lambda metadata, _, index: metadata.storage_data.pop(index))
    yield changed(lambda metadata, entry, _: vars(metadata)["state_dict_metadata"].update({7: entry}))
    yield changed(lambda metadata, _, index: metadata.state_dict_metadata.update({"a": metadata.storage_data[index]}))
    yield changed(lambda _, entry, __: setattr(entry, "size", torch.Size([16])))
    yield changed(lambda _, entry, __: setattr(entry.properties, "dtype", 7))


def test_what_is_damaged_is_said_in_one_sentence(folder: Path) -> None:
    place = folder / "iter_0000005"
    whole = {name: (place / name).read_bytes() for name in (".metadata", "common.pt")}
    cases = {
        ".metadata": (b"", whole[".metadata"][:100], b"garbage", pickle.dumps({"a": 1}), pickle.dumps(Metadata({}))),
        "common.pt": (b"", whole["common.pt"][:100], b"garbage"),
    }
    for name, contents in cases.items():
        for content in contents:
            (place / name).write_bytes(content)
            with pytest.raises(InputError, match=rf"{name}|is damaged") as said:
                TensorReader(folder, 5)
            assert "\n" not in str(said.value)
        (place / name).unlink()
        with pytest.raises(InputError, match=name):
            TensorReader(folder, 5)
        (place / name).write_bytes(whole[name])
    for part in damaged_metadata(whole[".metadata"]):
        (place / ".metadata").write_bytes(part)
        with pytest.raises(InputError, match=r"no readable \.metadata|does not say where a part of it lies") as said:
            TensorReader(folder, 5).read("output_layer.weight", None, tuple(tensors()["output_layer.weight"].shape))
        assert "\n" not in str(said.value)
    (place / ".metadata").write_bytes(whole[".metadata"])
    torch.save([1], place / "common.pt")
    with pytest.raises(InputError, match="holds a list"):
        read_common(place)


def test_an_iterations_folder_may_be_named(folder: Path) -> None:
    place = folder / "iter_0000005"
    assert find_checkpoint(place, "checkpoint") == (place, 5) and iteration_folder(place, 5) == place
    assert read_architecture(place) == read_architecture(folder)
    with pytest.raises(InputError, match="is an iteration of a checkpoint: name another folder to write to"):
        output_folder(str(place), "train.checkpoint")
    (place / ".unfinished").mkdir()
    finish_iteration(place, place / ".unfinished", 9)  # never in its own place
    assert (place / "iter_0000009").is_dir() and (place / ".metadata").is_file()
    (place / TRACKER).unlink()
    alone = folder.rename(folder.with_name("moved")) / "iter_0000005"
    alone = alone.rename(alone.with_name("release"))
    assert find_checkpoint(alone, "checkpoint") == (alone, 0) and TensorReader(alone, 0).dtype("output_layer.weight")
    (alone.parent / TRACKER).write_text("release\n")
    assert describe(alone.parent)["newest_finished"] == 0
    assert find_checkpoint(alone.parent, "checkpoint") == (alone, 0)


@pytest.mark.parametrize("older", [False, True])
def test_signals_of_every_python(folder: Path, older: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python up to 3.11.3 pickles a signal by its name in the module, later ones by its number."""
    if older:
        monkeypatch.setattr(signal.Signals, "__reduce_ex__", lambda self, protocol: self.name)
    else:
        monkeypatch.setattr(signal.Signals, "__reduce_ex__", lambda self, protocol: (signal.Signals, (int(self),)))
    torch.save({"args": argparse.Namespace(**ARGUMENTS)}, folder / "iter_0000005" / "common.pt")
    assert read_common(folder / "iter_0000005")["args"].exit_signal is signal.SIGTERM


WITHOUT_MEGATRON = """
import sys
from pathlib import Path
from minitron_mcore.checkpoint.folder import read_architecture
from minitron_mcore.checkpoint.unpickle import read_common
assert "torch" not in sys.modules
place = Path(sys.argv[1])
args = read_common(place)["args"]
print(read_architecture(place).num_layers, args.exit_signal, args.attention_backend, args.seeds)
assert "megatron" not in sys.modules
"""


def test_a_checkpoint_is_described_without_megatron(folder: Path) -> None:
    more = {"attention_backend": AttnBackend.flash, "seeds": numpy.arange(2, dtype="uint32")}
    place = folder / "iter_0000005"
    torch.save({"args": argparse.Namespace(**ARGUMENTS, **more)}, place / "common.pt")
    command = [sys.executable, "-c", WITHOUT_MEGATRON, str(place)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.stdout == f"2 {signal.SIGTERM!s} AttnBackend({AttnBackend.flash.value},) [0 1]\n", found.stderr


def pickled_as_before_3_11_4(self: Enum, protocol: Any) -> Any:
    return getattr, (type(self), self.name)


def test_enums_of_python_3_11_2(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They were pickled as a call of getattr, in both files; this one is admitted, and for enums alone."""
    place = folder / "iter_0000005"
    metadata = pickle.loads((place / ".metadata").read_bytes())
    metadata.planner_data = [WriteItemType.TENSOR]
    monkeypatch.setattr(WriteItemType, "__reduce_ex__", pickled_as_before_3_11_4)
    monkeypatch.setattr(AttnBackend, "__reduce_ex__", pickled_as_before_3_11_4)
    (place / ".metadata").write_bytes(pickle.dumps(metadata))
    torch.save({"args": argparse.Namespace(attention_backend=AttnBackend.flash)}, place / "common.pt")
    assert b"getattr" in (place / ".metadata").read_bytes()
    assert read_metadata(place).planner_data == [WriteItemType.TENSOR]
    assert read_common(place)["args"].attention_backend is AttnBackend.flash


class Attribute:
    """Asks for an attribute of a class when it is unpickled."""

    def __init__(self, kind: Any, name: str) -> None:
        self.asked = kind, name

    def __reduce__(self) -> Any:
        return getattr, self.asked


@pytest.mark.parametrize("asked", [(WriteItemType, "__subclasses__"), (WriteItemType, "mro"), (MetadataIndex, "fqn")])
@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_getattr_is_for_members_of_enums(folder: Path, name: str, asked: tuple[Any, str]) -> None:
    place = folder / "iter_0000005"
    if name == "common.pt":
        asked = (argparse.Namespace, "__init__") if asked[0] is MetadataIndex else (AttnBackend, asked[1])
        torch.save({"evil": Attribute(*asked)}, place / name)
    else:
        metadata = pickle.loads((place / ".metadata").read_bytes())
        metadata.planner_data = Attribute(*asked)
        (place / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(InputError, match=r"builtins\.getattr, .* may run code: set trust=true"):
        (read_metadata if name == ".metadata" else read_common)(place)
