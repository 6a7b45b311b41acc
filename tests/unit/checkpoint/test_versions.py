"""What other versions of megatron-core, Python and numpy store under other names is read; what is written, all read."""

from __future__ import annotations

import argparse
import os
import pickle
import signal
import zipfile
from pathlib import Path, PosixPath
from typing import Any

import numpy
import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from minitron_mcore.checkpoint.stated import Stated, stating
from minitron_mcore.checkpoint.unpickle import read_common, read_metadata
from minitron_mcore.checkpoint.versions import COMMON_OBJECT, Unknown
from minitron_mcore.errors import InputError
from tests.unit.checkpoint.test_unpickle import save_plainly


class OneOf:
    """A class that has another name in the file."""


class Later:
    """Pickled as a member of an enum, or as an object with a state, of a module that is not there."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


def renamed(content: Any, names: dict[bytes, bytes]) -> bytes:
    """The pickle of `content` with its classes under other names, which protocol 2 has as text."""
    code = pickle.dumps(content, 2)
    for name, other in names.items():
        assert name in code, code
        code = code.replace(name, other)
    return code


def save_renamed(content: Any, path: Path, names: dict[bytes, bytes]) -> None:
    """torch.save, with classes under other names."""
    torch.save(content, path)
    with zipfile.ZipFile(path) as packed:
        members = {entry.filename: packed.read(entry) for entry in packed.infolist()}
    with zipfile.ZipFile(path, "w") as packed:
        for member, data in members.items():
            if member.endswith("data.pkl"):
                for name, other in names.items():
                    assert name in data, data
                    data = data.replace(name, other)
            packed.writestr(member, data)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_plainly({"a": torch.zeros(3), COMMON_OBJECT: [{"where": 1}]}, tmp_path)
    return tmp_path


HERE = PosixPath.__module__.encode()


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("module", [b"pathlib", b"pathlib._local"])
def test_a_path_of_every_python(place: Path, module: bytes, trust: bool) -> None:
    names = {b"c" + HERE + b"\nPosixPath": b"c" + module + b"\nPosixPath"}
    metadata = pickle.loads((place / ".metadata").read_bytes())
    metadata.storage_meta.checkpoint_id = Path("/a/b")
    (place / ".metadata").write_bytes(renamed(metadata, names))
    with stating(Stated(trust=trust)):
        assert getattr(read_metadata(place).storage_meta, "checkpoint_id", None) == Path("/a/b")
    save_renamed({"where": Path("/a/b")}, place / "common.pt", names)
    with stating(Stated(trust=trust)):
        assert read_common(place)["where"] == Path("/a/b")


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_an_array_of_every_numpy(place: Path, module: bytes) -> None:
    array = numpy.arange(5, dtype=numpy.uint32)
    here = array.__reduce__()[0].__module__.encode()
    save_renamed({"where": array}, place / "common.pt", {b"c" + here + b"\n": b"c" + module + b"\n"})
    assert numpy.array_equal(read_common(place)["where"], array)


def test_classes_of_another_megatron_are_kept_and_never_called(place: Path) -> None:
    """A name may say anything: here a function of the system's, behind the modules that Megatron has."""

    for name in ("megatron.core.transformer.enums.Later", "megatron.core.os.system", "megatron.training.config.Later"):
        module, _, last = name.rpartition(".")
        kinds: list[Any] = [(OneOf, ("true",)), (OneOf, (7,), {"state": [1]})]
        names = {f"c{__name__}\nOneOf\n".encode(): f"c{module}\n{last}\n".encode()}
        save_renamed({"args": argparse.Namespace(a=[Later(*kind) for kind in kinds])}, place / "common.pt", names)
        first, second = read_common(place)["args"].a
        assert isinstance(first, Unknown) and first.arguments == ("true",) and repr(first) == f"{last}('true',)"
        assert second.arguments == (7,) and second.state == [1]


def test_classes_of_another_megatron_where_the_file_is_trusted(place: Path) -> None:
    names = {f"c{__name__}\nOneOf\n".encode(): b"cmegatron.core.transformer.enums\nLater\n"}
    save_renamed({"args": Later(OneOf, (3,)), "module": signal.SIGTERM}, place / "common.pt", names)
    with stating(Stated(trust=True)):
        common = read_common(place)
    assert isinstance(common["args"], Unknown) and common["args"].arguments == (3,)
    assert common["module"] is signal.SIGTERM


@pytest.mark.parametrize("name", ["megatronx.core.system", "os.system", "builtins.eval", "minitron_mcore.files.x"])
def test_other_classes_are_refused(place: Path, name: str) -> None:
    module, _, last = name.rpartition(".")
    names = {f"c{__name__}\nOneOf\n".encode(): f"c{module}\n{last}\n".encode()}
    save_renamed({"a": Later(OneOf, ("true",))}, place / "common.pt", names)
    with pytest.raises(InputError, match=rf"common\.pt asks for {name}, .* may run code"):
        read_common(place)


def test_the_common_part_lies_in_a_file_or_among_the_tensors(place: Path) -> None:
    assert read_common(place) == {"where": 1}
    torch.save({"where": 2}, place / "common.pt")
    assert read_common(place) == {"where": 2}


def test_a_common_part_that_cannot_be_read_is_told_in_a_sentence(place: Path) -> None:
    def told(words: str) -> None:
        with pytest.raises(InputError, match=words) as said:
            read_common(place)
        assert "\n" not in str(said.value) and str(place) in str(said.value)

    whole = read_metadata(place)
    (info,) = (info for index, info in whole.storage_data.items() if index.fqn == COMMON_OBJECT)
    data = (place / info.relative_path).read_bytes()
    (place / info.relative_path).write_bytes(
        data[: info.offset] + b"x" * info.length + data[info.offset + info.length :]
    )
    told(r"\(common_state/shard_0_1\) is damaged and cannot be read")
    (place / info.relative_path).write_bytes(data[:10])
    told(r"\(common_state/shard_0_1\) is damaged and cannot be read")
    os.remove(place / info.relative_path)
    told(r"\(common_state/shard_0_1\) cannot be read: no such file")
    info.transform_descriptors = ["zstd"]
    (place / ".metadata").write_bytes(pickle.dumps(whole))
    told(r"\(common_state/shard_0_1\) is compressed \(zstd\)")
    del whole.storage_data[next(index for index in whole.storage_data if index.fqn == COMMON_OBJECT)]
    whole.storage_data[MetadataIndex("b")] = info
    (place / ".metadata").write_bytes(pickle.dumps(whole))
    told(r"common\.pt is missing")
    save_plainly({"a": torch.zeros(3), COMMON_OBJECT: [1, 2]}, place)
    told(r"\(common_state/shard_0_1\) holds a list where a checkpoint has a mapping")
