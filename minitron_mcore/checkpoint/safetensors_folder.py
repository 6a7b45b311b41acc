"""The weights of a Hugging Face folder: safetensors, in one file or several with an index, read by slices."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.conversion import Unit
from minitron_mcore.checkpoint.safetensors_file import SafetensorsFile
from minitron_mcore.errors import InputError
from minitron_mcore.layout import local_shape

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD = "lm_head.weight"
ROWS = 4096  # of two embeddings that are compared


def _unseen(name: str, tensor: torch.Tensor) -> None:
    """Nobody looks at what is read."""


def _read_index(path: Path) -> dict[str, str]:
    """File names by tensor name."""
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no index of safetensors: it has no weight_map") from error
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise InputError(f"{path} is no index of safetensors: its weight_map is to name a file for each tensor")
    return places


class SafetensorsFolder:
    """`look(name, part)` is called with every part of a tensor that is read, before it is put together with others."""

    def __init__(self, source: Path, look: Callable[[str, torch.Tensor], None] = _unseen) -> None:
        self.source = source
        self.look = look
        self.files: dict[str, SafetensorsFile] = {}
        self.widened: dict[str, torch.dtype] = {}  # tensors that are stored in a wider type than they lie here in
        if (source / INDEX).is_file():
            self.places = _read_index(source / INDEX)
            if (source / SINGLE).is_file() and SINGLE not in self.places.values():
                raise InputError(
                    f"hf={source} holds both {SINGLE} and {INDEX}, which names other files: the weights may be of two "
                    "models, move away what does not belong there"
                )
        elif (source / SINGLE).is_file():
            self.places = dict.fromkeys(self._open(SINGLE).tensors, SINGLE)
        else:
            raise InputError(
                f"hf={source} holds neither {SINGLE} nor {INDEX}: only safetensors are read, which transformers' "
                "save_pretrained writes of weights in other files"
            )

    def path(self, name: str) -> Path:
        """The file that holds tensor `name`."""
        return self.source / self.places[name]

    def dtype(self, name: str) -> torch.dtype:
        """The type in which `name` is read."""
        return self.widened.get(name) or self._file(name).dtype(name)

    def _open(self, file: str) -> SafetensorsFile:
        if file not in self.files:
            path = self.source / file
            if not path.is_file():
                raise InputError(f"{path} is missing, though {INDEX} names it")
            self.files[file] = SafetensorsFile(path)
        return self.files[file]

    def _file(self, name: str) -> SafetensorsFile:
        file = self._open(self.places[name])
        if name not in file.tensors:
            raise InputError(f"{file.path} holds no {name}, though {INDEX} says so")
        return file

    def check(self, wanted: list[Unit], architecture: Architecture, *, allow_extra: bool = False) -> list[str]:
        """Raise InputError unless the folder holds exactly what `wanted` needs, in its shapes; returns warnings.

        The layers of one kind are of one type, since a checkpoint holds them as one tensor: the one that holds all of
        theirs exactly. With `allow_extra` tensors that nothing needs are left out.
        """
        kinds: dict[str, torch.dtype] = {}  # by checkpoint key
        shapes = {
            name: shape for unit in wanted for name, shape in zip(unit.names, unit.shapes(architecture), strict=True)
        }
        keys = {name: unit.parameter.key for unit in wanted for name in unit.names}
        for name, shape in shapes.items():
            if name not in self.places:
                raise InputError(f"hf={self.source} holds no tensor {name}, which its config.json asks for")
            if (found := self._file(name).shape(name)) != shape:
                raise InputError(f"{self.path(name)}: {name} is of shape {found}, but config.json means {shape}")
            dtype = self._file(name).dtype(name)
            kinds[keys[name]] = torch.promote_types(kinds.get(keys[name], dtype), dtype)
        self.widened = {name: kinds[key] for name, key in keys.items() if self._file(name).dtype(name) != kinds[key]}
        notes = []
        if self.widened:
            name, dtype = next(iter(self.widened.items()))
            notes.append(
                f"tensors of one kind are of several types: {len(self.widened)} are widened, which is exact; {name} "
                f"to {dtype}"
            )
        # What an index leaves out is there all the same, and transformers would load it.
        for file, opened in self.files.items():
            self.places = {**dict.fromkeys(opened.tensors, file), **self.places}
        # Older Llama folders carry their rotary frequencies, and tied heads may lie there twice; both are known.
        known = {*shapes, *([] if architecture.untie_embeddings_and_output_weights else [HEAD])}
        extra = [name for name in self.places if name not in known and not name.endswith("rotary_emb.inv_freq")]
        if extra and not allow_extra:
            raise InputError(
                f"{self.path(extra[0])} holds a tensor {extra[0]}, which a {architecture.family} model does not have; "
                "allow=[extra_tensors] leaves it out, as transformers does"
            )
        if extra:
            notes.append(
                f"{len(extra)} tensors that a {architecture.family} model does not have are left out: {extra[0]}"
            )
        return notes

    def check_tied_head(self, embedding: str) -> None:
        """Raise InputError where a tied model's output head lies there too, and is not its `embedding`.

        transformers would then untie them. One process calls, after `check`; a few rows of both are in memory.
        """
        if HEAD not in self.places:
            return
        files, names = [self._file(name) for name in (embedding, HEAD)], (embedding, HEAD)
        same = len({(file.shape(name), file.dtype(name)) for file, name in zip(files, names, strict=True)}) == 1
        count, *row = files[0].shape(embedding)
        for start in range(0, count if same else 0, ROWS):
            parts = [torch.empty(min(ROWS, count - start), *row, dtype=files[0].dtype(embedding)) for _ in files]
            for file, name, part in zip(files, names, parts, strict=True):
                file.read_into(name, part, 0, start)
            same = same and torch.equal(*parts)
        if not same:
            raise InputError(
                f"{self.path(HEAD)}: {HEAD} is not {embedding}, though config.json says tie_word_embeddings=true: "
                "say false there, or take the tensor away"
            )

    def read_part(self, unit: Unit, architecture: Architecture, rank: int, size: int) -> torch.Tensor:
        """Tensor-parallel `rank`'s part of a checkpoint tensor [layout.local_shape], vocabulary padding as zeros."""
        parts = [self.read_slice(unit, index, architecture, rank, size) for index in range(len(unit.names))]
        local = unit.layout.join(parts, architecture)
        assert tuple(local.shape) == local_shape(unit.parameter, architecture, size), (unit, local.shape)
        return local.contiguous()

    def read_slice(self, unit: Unit, index: int, architecture: Architecture, rank: int, size: int) -> torch.Tensor:
        """Tensor-parallel `rank`'s part of the `index`-th Hugging Face tensor of `unit`, padded like `read_part`.

        Only the part's bytes are read, straight to where they stay.
        """
        name, axis = unit.names[index], unit.parameter.shard_axis
        file, shape = self._file(name), list(unit.shapes(architecture)[index])
        start = 0
        held = shape
        if axis is not None:
            full = architecture.padded_vocab_size if "vocab" in unit.parameter.axes else shape[axis]
            start, stop = (min(edge * full // size, shape[axis]) for edge in (rank, rank + 1))
            shape = [*shape[:axis], full // size, *shape[axis + 1 :]]
            held = [*shape[:axis], stop - start, *shape[axis + 1 :]]
        # Padding is rows, hence at the end of the buffer.
        local = (torch.empty if held == shape else torch.zeros)(shape, dtype=file.dtype(name))
        part = local if held == shape else local[: held[0]]
        file.read_into(name, part, axis or 0, start)
        self.look(name, part)
        return local.to(self.dtype(name))
