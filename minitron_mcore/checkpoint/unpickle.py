"""Reads the two pickles of a torch_dist checkpoint, `.metadata` and its common part (versions.py says where that is),
without running code from them.

A pickle names the classes and functions that loading it calls; a stranger's may name any. Only those that torch and
megatron-core write are admitted, and none of them runs code of the file's choosing; anything else is refused, unless
the user trusts the file (`trust=true`). Megatron's own classes become inert stand-ins.
Pure; torch, which takes seconds to import, is imported where a pickle is read.
"""

from __future__ import annotations

import argparse
import io
import pickle
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy

from minitron_mcore.checkpoint import versions
from minitron_mcore.checkpoint.seal import Seal
from minitron_mcore.checkpoint.stated import said_by_user
from minitron_mcore.errors import InputError
from minitron_mcore.files import not_read

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

EXTRA_STATE = re.compile(r"_extra_state/shard_\d+_\d+$")

_METADATA, _PLANNER = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner"
_TORCH_DIST = "megatron.core.dist_checkpointing.strategies.torch"
# megatron-core's subclasses of torch's classes, which add nothing that is read here -> torch's.
OF_MEGATRON = {
    (_TORCH_DIST, "MCoreMetadata"): (_METADATA, "Metadata"),
    (_TORCH_DIST, "MCoreSavePlan"): (_PLANNER, "SavePlan"),
}
# What `.metadata` is made of, by module. megatron-core's writer keeps the plans it saved by in it.
METADATA_CLASSES = {
    _METADATA: "Metadata MetadataIndex TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata "
    "TensorProperties StorageMeta _MEM_FORMAT_ENCODING",
    _PLANNER: "SavePlan WriteItem WriteItemType TensorWriteData BytesIOWriteData",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo _StoragePrefix",
    # Where torch 2.2 and older kept the properties.
    "torch.distributed._shard.sharded_tensor.metadata": "TensorProperties MEM_FORMAT_ENCODING",
    "torch": "Size",
    "torch.serialization": "_get_layout",
    "collections": "OrderedDict",
    "builtins": "set frozenset",
}


class _RefusedError(Exception):
    """The pickle asks for a class that is not admitted."""


def enum_member(kind: Any, name: Any) -> Enum | versions.Unknown:
    """What pickles of Python 3.11.0 to 3.11.3 call `builtins.getattr` for: a member of an enum, and nothing else."""
    if isinstance(kind, type) and issubclass(kind, Enum) and isinstance(name, str) and name in kind.__members__:
        return kind[name]
    if isinstance(kind, type) and issubclass(kind, versions.Unknown):
        return kind(name)
    raise _RefusedError("builtins.getattr")


def number_type(*given: Any) -> numpy.dtype[Any]:
    """A type of numbers, of which arrays hold no addresses of objects: those that a file makes up would be followed."""
    found = numpy.dtype(*given)
    if found.kind not in "biufc":
        raise _RefusedError(f"numpy.dtype({found.str!r})")
    return found


# What the common part holds, Megatron-LM's parsed arguments among it, beside what torch itself admits.
# Python up to 3.11.3 pickles a signal (`exit_signal`) as the name signal.SIGTERM, later ones as signal.Signals(15).
COMMON_CLASSES: list[Any] = [
    *(argparse.Namespace, SimpleNamespace, io.BytesIO, numpy.ndarray, numpy.dtypes.UInt32DType),
    (number_type, "numpy.dtype"),
    signal.Signals,
    *((member, f"signal.{member.name}") for member in signal.Signals),
    (enum_member, "builtins.getattr"),
    *((made, ".".join(name)) for name, made in (versions.PATHS | versions.ARRAYS).items()),
]


def refuse(path: Path | versions.CommonPart, asked: str) -> InputError:
    rule = f"asks for {asked}, which no checkpoint needs and which may run code"
    return InputError("", path, rule, "set trust=true if you trust where it comes from")


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, stream: BinaryIO) -> None:
        super().__init__(stream)
        self._seal = Seal()

    def load(self) -> Any:
        try:
            loaded = super().load()
        finally:
            if changed := self._seal.restore():
                raise _RefusedError(f"a change of {changed}")
        return loaded

    def find_class(self, module: str, name: str) -> Any:
        return self._seal.put(self._admitted(module, name))

    def _admitted(self, module: str, name: str) -> Any:
        import torch

        module, name = OF_MEGATRON.get((module, name), (module, name))
        if (module, name) == ("builtins", "getattr"):
            return enum_member
        if (module, name) in versions.PATHS:
            return versions.PATHS[module, name]
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in METADATA_CLASSES.get(module, "").split():
            return super().find_class(module, name)
        raise _RefusedError(f"{module}.{name}")


def read_metadata(place: Path) -> Metadata:
    """The `.metadata` of an iteration's folder: every stored tensor's shape, dtype and place. No collective.

    Raises InputError if it is damaged or asks for anything but the classes of a checkpoint.
    """
    path = place / ".metadata"
    try:
        with path.open("rb") as stream:
            metadata = (versions.AnyVersion if said_by_user().trust else _MetadataUnpickler)(stream).load()
        is_metadata = _is_whole(metadata)
    except _RefusedError as error:
        raise refuse(path, str(error)) from error
    except Exception as error:  # unpickling raises whatever the damage led to
        raise InputError("", place, f"has no readable .metadata: {error}") from error
    if not is_metadata:
        raise InputError("", place, "has no readable .metadata: it is not that of a torch_dist checkpoint")
    for entry in metadata.storage_data.values():
        name = getattr(entry, "relative_path", None)
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError("", path, f"names the file {name!r}, but a checkpoint's files lie beside it")
    return metadata


def _is_whole(metadata: Any) -> bool:
    """Whether it has the form of a checkpoint's metadata; raises AttributeError if a part of it is missing."""
    entries, places = metadata.state_dict_metadata, metadata.storage_data
    if not (isinstance(entries, dict) and isinstance(places, dict)):
        return False
    numbers = [number for info in places.values() for number in (info.offset, info.length)]
    return all(isinstance(number, int) and number >= 0 for number in numbers) and all(
        isinstance(name, str) and (versions.is_object(entry) or is_tensor(entry)) for name, entry in entries.items()
    )


def is_tensor(entry: Any) -> bool:
    """Whether an entry of `.metadata` is a tensor, and whole; told by the name of its class, as objects are."""
    import torch

    if type(entry).__name__ != "TensorStorageMetadata" or not isinstance(entry.properties.dtype, torch.dtype):
        return False
    axes = [(chunk.offsets, chunk.sizes) for chunk in entry.chunks]
    return all(len(offsets) == len(sizes) == len(entry.size) for offsets, sizes in axes)


@contextmanager
def admitting(entries: Sequence[Any]) -> Iterator[None]:
    """Have torch admit `entries` and megatron-core's own classes alone, beside what it admits by itself. megatron-core
    adds numpy.dtype, for arrays of anything, and of two entries of a name either may count."""
    import torch

    before = torch.serialization.get_safe_globals()
    of_megatron = [each for each in before if getattr(each, "__module__", "").startswith("megatron.")]
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([*entries, *of_megatron])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def read_common(place: Path, metadata: Metadata | None = None) -> dict[str, Any]:
    """The common part of the iteration in the folder `place`: what is stored beside the sharded tensors. No collective.

    `metadata` is the iteration's `.metadata`, if it was read already. Raises InputError if the part is missing or
    damaged, or holds more than tensors, plain values and Megatron's own classes.
    """
    import torch

    part = versions.locate_common(place, metadata or read_metadata(place))
    if part is None:
        raise InputError("", place / versions.COMMON_FILE, f"is missing: {place} is not a whole torch_dist checkpoint")
    asked: list[str] = []  # classes that torch does not admit
    try:
        with admitting(COMMON_CLASSES), part.open() as stream:
            how: dict[str, Any] = {"weights_only": False, "pickle_module": versions.ANY_VERSION}
            if not said_by_user().trust:
                how = {"weights_only": True}
                with suppress(Exception):  # whatever the damage led to, which loading will report
                    asked = torch.serialization.get_unsafe_globals_in_checkpoint(stream)
            stream.seek(0)
            unknown: list[Any] = [(versions.stand_in(name), name) for name in asked if name.startswith("megatron.")]
            with torch.serialization.safe_globals(unknown):
                content = torch.load(stream, map_location="cpu", **how)
    except _RefusedError as error:
        raise refuse(part, str(error)) from error
    except OSError as error:
        raise not_read(str(part), error) from error
    except Exception as error:  # torch.load raises whatever the damage led to
        words = " ".join(str(error).split())
        named = re.search(r"(?:GLOBAL|[Uu]nsupported class|global) ([\w.]+\.\w+)", words)
        strangers = [named[1]] if named else [name for name in asked if not name.startswith("megatron.")]
        if strangers:
            raise refuse(part, strangers[0]) from error
        raise InputError("", part, f"is damaged and cannot be read: {words[:200]}") from error
    is_boxed = part.length is not None and isinstance(content, list) and len(content) == 1
    common = content[0] if is_boxed else content
    if not isinstance(common, dict):
        raise InputError("", part, f"holds a {type(common).__name__} where a checkpoint has a mapping")
    return common


def refuse_objects(place: Path, metadata: Metadata) -> None:
    """Raise InputError if there are pickled objects among the tensors, which torch would unpickle without restriction.

    That is `torch.distributed.checkpoint.load`, when it finds an object under the name of a tensor it was asked for.
    Extra states are never asked for here.
    """
    for key, entry in metadata.state_dict_metadata.items():
        is_asked_for = not EXTRA_STATE.search(key)
        if versions.is_object(entry) and is_asked_for and not said_by_user().trust:
            raise refuse(place / ".metadata", f"the pickled object {key}")
