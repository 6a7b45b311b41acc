"""Reading the two pickles of a torch_dist checkpoint, `.metadata` and `common.pt`, without running what lies in them.

A pickle names the classes and functions that loading it calls; a stranger's may name any. Here only those that torch
and megatron-core write are admitted, none of which runs code of the file's choosing; what else a file asks for is
refused, unless the user trusts it (`trust=true`).
"""

from __future__ import annotations

import argparse
import pickle
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer import enums
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta

from minitron_mcore.errors import InputError

_trusted: ContextVar[bool] = ContextVar("trusted", default=False)

_PLANNER = "torch.distributed.checkpoint.planner"
_SHARDED_TENSOR = "torch.distributed._shard.sharded_tensor.metadata"  # where torch 2.2 and older kept the properties
_TORCH_DIST = "megatron.core.dist_checkpointing.strategies.torch"
# What `.metadata` is made of. megatron-core's writer keeps the plans it saved by in it.
METADATA_CLASSES = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    *((_PLANNER, name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    (_SHARDED_TENSOR, "TensorProperties"),
    (_SHARDED_TENSOR, "MEM_FORMAT_ENCODING"),
    (_TORCH_DIST, "MCoreMetadata"),
    (_TORCH_DIST, "MCoreSavePlan"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("builtins", "set"),
    ("builtins", "frozenset"),
}
# What Megatron-LM's parsed arguments in `common.pt` hold, beside what torch and megatron-core admit themselves.


class _RefusedError(Exception):
    """The pickle asks for a class that is not admitted."""


def enum_member(kind: Any, name: Any) -> Enum:
    """What pickles of Python 3.11.0 to 3.11.3 call `builtins.getattr` for: a member of an enum, and nothing else."""
    if isinstance(kind, type) and issubclass(kind, Enum) and isinstance(name, str) and name in kind.__members__:
        return kind[name]
    raise _RefusedError("builtins.getattr")


# Python up to 3.11.3 pickles a signal (`exit_signal`) as the name signal.SIGTERM, later ones as signal.Signals(15).
COMMON_CLASSES: list[Any] = [
    argparse.Namespace,
    *((member, f"signal.{member.name}") for member in signal.Signals),
    (enum_member, "builtins.getattr"),
    PipelineParallelLayerLayout,
    *(entry for entry in vars(enums).values() if isinstance(entry, type) and entry.__module__ == enums.__name__),
]


@contextmanager
def trusting(trust: bool) -> Iterator[None]:
    """While it lasts, checkpoints are read as if their origin were trusted, if `trust`: their pickles may run code."""
    token = _trusted.set(trust)
    try:
        yield
    finally:
        _trusted.reset(token)


def refuse(path: Path, asked: str) -> InputError:
    return InputError(
        f"{path} asks for {asked}, which no checkpoint needs and which may run code: set trust=true if you trust "
        "where it comes from"
    )


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return enum_member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in METADATA_CLASSES:
            return super().find_class(module, name)
        raise _RefusedError(f"{module}.{name}")


def read_metadata(place: Path) -> Metadata:
    """The `.metadata` of an iteration's folder: every stored tensor's shape, dtype and place. No collective.

    Raises InputError where it is damaged, or asks for anything but the classes of a checkpoint.
    """
    path = place / ".metadata"
    try:
        with path.open("rb") as stream:
            metadata = (pickle.Unpickler if _trusted.get() else _MetadataUnpickler)(stream).load()
        is_metadata = isinstance(metadata.state_dict_metadata, dict) and isinstance(metadata.storage_data, dict)
    except _RefusedError as error:
        raise refuse(path, str(error)) from error
    except Exception as error:  # unpickling raises whatever the damage led to
        raise InputError(f"{place} has no readable .metadata: {error}") from error
    if not is_metadata:
        raise InputError(f"{place} has no readable .metadata: it is that of no torch_dist checkpoint")
    for entry in metadata.storage_data.values():
        name = getattr(entry, "relative_path", None)
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"{path} names the file {name!r}: a checkpoint's files lie beside it")
    if getattr(metadata, "storage_meta", None) is None:
        metadata.storage_meta = StorageMeta()
    return metadata


def read_common(place: Path) -> dict[str, Any]:
    """The `common.pt` of an iteration's folder: what is stored beside the sharded tensors. No collective.

    Raises InputError where it is missing or damaged, or holds more than tensors, plain values and Megatron's enums.
    """
    path = place / "common.pt"
    if not path.is_file():
        raise InputError(f"{path} is missing: {place} is no whole torch_dist checkpoint")
    try:
        # The context takes away what it was given when it ends, what was admitted before as well.
        admitted = torch.serialization.get_safe_globals()
        with torch.serialization.safe_globals([entry for entry in COMMON_CLASSES if entry not in admitted]):
            common = torch.load(path, map_location="cpu", weights_only=not _trusted.get())
    except _RefusedError as error:
        raise refuse(path, str(error)) from error
    except Exception as error:  # torch.load raises whatever the damage led to
        words = " ".join(str(error).split())
        if (asked := re.search(r"(?:GLOBAL|[Uu]nsupported class|global) ([\w.]+\.\w+)", words)) is not None:
            raise refuse(path, asked.group(1)) from error
        raise InputError(f"{path} is damaged, it cannot be read: {words[:200]}") from error
    if not isinstance(common, dict):
        raise InputError(f"{path} holds a {type(common).__name__}, where a checkpoint has a mapping")
    return common


def refuse_objects(place: Path, metadata: Metadata) -> None:
    """Raise InputError where pickled objects lie among the tensors, for torch unpickles them without restriction.

    Only `torch.distributed.checkpoint.load` does, when it finds one under the name it was asked for.
    """
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata) and not _trusted.get():
            raise refuse(place / ".metadata", f"the pickled object {key}")
