"""What versions of megatron-core, Python and numpy store in different places or under different names; only this file
of the room knows.

    what                  older                                  newer
    the common part       common.pt                              the object common_state/shard_0_1 among the tensors
                          (megatron-core up to 0.18; ours)       (from 0.19 on, so today's Megatron-LM and Bridge)
    a path                pathlib.PosixPath                      pathlib._local.PosixPath (Python 3.13)
    an array              numpy.core.multiarray (numpy 1)        numpy._core.multiarray (numpy 2)
    classes of Megatron   those of the installed version         any of megatron.*: kept, never called
                                                                 (InferenceCudaGraphScope from 0.18 on, in all args)

This project writes the older form of the first, and a path as a string, so that every version reads what it wrote.
Pure.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path, PosixPath
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy

from minitron_mcore.errors import InputError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

COMMON_FILE = "common.pt"
COMMON_OBJECT = "common_state/shard_0_1"

# (module, name) as pickled -> what it is here.
PATHS: dict[tuple[str, str], Any] = {(module, "PosixPath"): PosixPath for module in ("pathlib", "pathlib._local")}
ARRAYS: dict[tuple[str, str], Any] = {
    (module, "_reconstruct"): numpy.empty(0).__reduce__()[0]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray")
}


@dataclass(frozen=True)
class CommonPart:
    """Where an iteration keeps what is stored beside its tensors: the whole file `path`, or `length` bytes of it from
    `offset` on, which hold a list of one."""

    path: Path
    offset: int = 0
    length: int | None = None

    def __str__(self) -> str:
        return str(self.path) if self.length is None else f"{self.path} ({COMMON_OBJECT})"

    def open(self) -> BinaryIO:
        """The bytes, as a file. Raises OSError."""
        if self.length is None:
            return self.path.open("rb")
        with self.path.open("rb") as stream:
            stream.seek(self.offset)
            return io.BytesIO(stream.read(self.length))


def locate_common(place: Path, metadata: Metadata) -> CommonPart | None:
    """Where the iteration in the folder `place` keeps its common part; if both forms are there, the older counts, as
    for megatron-core. None if neither is. Raises InputError if its form is not supported."""
    if (file := place / COMMON_FILE).is_file():
        return CommonPart(file)
    if not is_object(metadata.state_dict_metadata.get(COMMON_OBJECT)):
        return None
    for index, info in (metadata.storage_data or {}).items():
        if getattr(index, "fqn", None) == COMMON_OBJECT:
            found = CommonPart(place / info.relative_path, info.offset, info.length)
            if getattr(info, "transform_descriptors", None):
                rule = f"is compressed ({', '.join(info.transform_descriptors)})"
                raise InputError("", found, rule, "save it uncompressed")
            return found
    return None


def is_object(entry: Any) -> bool:
    """Whether an entry of `.metadata` is a pickled object; told by name, as its class is slow to import."""
    return type(entry).__name__ == "BytesStorageMetadata"


def save_common(common: dict[str, Any], place: Path) -> None:
    """Write the common part of the iteration in the folder `place`, as every version reads it. One rank calls."""
    import torch

    torch.save(common, place / COMMON_FILE)


class Unknown:
    """Stands in for a class of megatron-core: keeps its arguments, runs nothing."""

    arguments: tuple[Any, ...] = ()

    def __new__(cls, *arguments: Any, **_: Any) -> Unknown:
        made = super().__new__(cls)
        made.arguments = arguments
        return made

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self.arguments}"


def stand_in(name: str) -> type[Unknown]:
    """An Unknown that goes by a class's dotted name."""
    return cast("type[Unknown]", type(name.rpartition(".")[2], (Unknown,), {}))


class AnyVersion(pickle.Unpickler):
    """Reads everything, under any version's names; only for trusted files."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in PATHS | ARRAYS:
            return (PATHS | ARRAYS)[module, name]
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError):
            if not module.startswith("megatron."):
                raise
            return stand_in(name)


# As much of the module pickle as torch.load asks for.
ANY_VERSION = SimpleNamespace(__name__="pickle", Unpickler=AnyVersion, load=lambda stream: AnyVersion(stream).load())
