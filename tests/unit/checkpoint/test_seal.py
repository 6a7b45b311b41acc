"""What a pickle does to the classes that it is lent, and to an enum's members, is refused and undone.

A class that has another name passes for another: an object, which torch unpickles without restriction, for a tensor.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItemType

from minitron_mcore.checkpoint.seal import Seal
from minitron_mcore.checkpoint.unpickle import read_common, read_metadata
from minitron_mcore.errors import InputError


def building(target: Any, state: Any) -> bytes:
    """Opcodes that give a pickle's `target` a state, and let go of it: they may stand before any pickle."""
    return pickle.dumps(target, 2)[:-1] + pickle.dumps(state, 2)[2:-1] + pickle.BUILD + pickle.POP


@pytest.fixture
def place(tmp_path: Path) -> Path:
    checkpoint.save({"weight": torch.ones(3)}, checkpoint_id=tmp_path, no_dist=True)
    return tmp_path


CHANGES: dict[str, tuple[Any, Any]] = {
    "BytesStorageMetadata.__name__": (BytesStorageMetadata, (None, {"__name__": "TensorStorageMetadata"})),
    "MetadataIndex.__hash__": (MetadataIndex, (None, {"__hash__": None})),
    "MetadataIndex.__match_args__": (MetadataIndex, (None, {"__match_args__": ()})),
    "Metadata.files": (Metadata, (None, {"files": "elsewhere"})),
    "WriteItemType._value_": (WriteItemType.TENSOR, {"_value_": 9}),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_classes_stay_as_they_are(changed: str, place: Path) -> None:
    path = place / ".metadata"
    whole = path.read_bytes()
    before = BytesStorageMetadata.__name__, MetadataIndex.__hash__, MetadataIndex.__match_args__
    path.write_bytes(building(*CHANGES[changed]) + whole)
    with pytest.raises(InputError, match=rf"\.metadata asks for a change of {changed}, which no checkpoint needs"):
        read_metadata(place)
    assert (BytesStorageMetadata.__name__, MetadataIndex.__hash__, MetadataIndex.__match_args__) == before
    assert not hasattr(Metadata, "files") and WriteItemType.TENSOR.value != 9
    path.write_bytes(whole)
    assert isinstance(read_metadata(place).state_dict_metadata["weight"], TensorStorageMetadata)


def test_what_is_as_it_was_is_no_change() -> None:
    seal = Seal()
    for each in (BytesStorageMetadata, WriteItemType, torch.Size, dict, building):
        seal.put(each)
    assert seal.restore() is None


@pytest.mark.parametrize("kind", ["O", "V8", "U4"])
def test_arrays_of_the_common_part_hold_numbers(kind: str, place: Path) -> None:
    """One of objects holds their addresses, which are the file's. Nor is it read where megatron-core has every type
    admitted."""

    class Type:
        def __reduce__(self) -> Any:
            return numpy.dtype, (kind,)

    torch.save({"evil": Type()}, place / "common.pt")
    refused = pytest.raises(InputError, match=r"asks for numpy\.dtype\('.*'\), which no checkpoint needs")
    with torch.serialization.safe_globals([numpy.dtype]), refused:
        read_common(place)
