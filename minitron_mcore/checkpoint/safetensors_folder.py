"""The weights of a Hugging Face folder: safetensors, in one file or several with an index, read by slices."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.blocks import Rows, rearranged
from minitron_mcore.checkpoint.conversion import Unit
from minitron_mcore.checkpoint.hf_config import INDEX, SINGLE
from minitron_mcore.checkpoint.safetensors_file import SafetensorsFile
from minitron_mcore.errors import InputError
from minitron_mcore.layout import local_shape

HEAD = "lm_head.weight"
ROWS = 4096  # of two embeddings that are compared


def _read_index(path: Path) -> dict[str, str]:
    """File names by tensor name."""
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError("", path, "is not a safetensors index: it has no weight_map") from error
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise InputError("", path, "is not a safetensors index: its weight_map must name a file for each tensor")
    return places


class SafetensorsFolder:
    """`look(name, part)` is called with every part of a tensor that is read, before it is joined with others, by
    whichever thread reads it."""

    def __init__(self, source: Path, look: Callable[[str, torch.Tensor], None] = lambda name, part: None) -> None:
        self.source = source
        self.look = look
        self.files: dict[str, SafetensorsFile] = {}
        self.widened: dict[str, torch.dtype] = {}  # tensors to be stored in a wider type than they have here
        if (source / INDEX).is_file():
            self.places = _read_index(source / INDEX)
            if (source / SINGLE).is_file() and SINGLE not in self.places.values():
                rule = f"holds both {SINGLE} and {INDEX}, which names other files: these may be weights of two models"
                raise InputError("hf", source, rule, "move away what does not belong there")
        elif (source / SINGLE).is_file():
            self.places = dict.fromkeys(self._open(SINGLE).tensors, SINGLE)
        else:
            rule = f"holds neither {SINGLE} nor {INDEX}, and only safetensors are read"
            raise InputError("hf", source, rule, "convert its weights with transformers' save_pretrained")

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
                raise InputError("", path, f"is missing, though {INDEX} names it")
            self.files[file] = SafetensorsFile(path)
        return self.files[file]

    def _file(self, name: str) -> SafetensorsFile:
        file = self._open(self.places[name])
        if name not in file.tensors:
            raise InputError("", file.path, f"holds no {name}, though {INDEX} says so")
        return file

    def check(self, wanted: list[Unit], architecture: Architecture, *, allow_extra: bool = False) -> list[str]:
        """Raise InputError unless the folder has exactly the tensors of `wanted`, in their shapes; returns warnings.

        The layers of one kind get one type, because a checkpoint stores them as one tensor: the narrowest that holds
        all their values exactly. With `allow_extra`, tensors that nothing needs are left out.
        """
        kinds: dict[str, torch.dtype] = {}  # by checkpoint key
        keys = {name: unit.parameter.key for unit in wanted for name in unit.names}
        shapes = [shape for unit in wanted for shape in unit.shapes(architecture)]
        for name, shape in zip(keys, shapes, strict=True):
            if name not in self.places:
                raise InputError("hf", self.source, f"holds no tensor {name}, which its config.json asks for")
            if (found := self._file(name).shape(name)) != shape:
                rule = f"holds {name} of shape {found}, but config.json means {shape}"
                raise InputError("", self.path(name), rule)
            dtype = self._file(name).dtype(name)
            kinds[keys[name]] = torch.promote_types(kinds.get(keys[name], dtype), dtype)
        self.widened = {name: kinds[key] for name, key in keys.items() if self._file(name).dtype(name) != kinds[key]}
        notes = []
        if self.widened:
            count, (name, dtype) = len(self.widened), next(iter(self.widened.items()))
            widened = f"{count} are widened, which is exact; {name} to {dtype}"
            notes.append(f"tensors of one kind have several types: {widened}")
        # transformers loads tensors that the index leaves out as well.
        for file, opened in self.files.items():
            self.places = {**dict.fromkeys(opened.tensors, file), **self.places}
        # Older Llama folders carry their rotary frequencies, and a tied head may be stored twice; both are fine.
        known = {*keys, *([] if architecture.untie_embeddings_and_output_weights else [HEAD])}
        extra = [name for name in self.places if name not in known and not name.endswith("rotary_emb.inv_freq")]
        not_there = f"a {architecture.family} model does not have"
        if extra and not allow_extra:
            remedy = "allow=[extra_tensors] leaves it out, as transformers does"
            raise InputError("", self.path(extra[0]), f"holds a tensor {extra[0]}, which {not_there}", remedy)
        if extra:
            notes.append(f"{len(extra)} tensors that {not_there} are left out: {extra[0]}")
        return notes

    def check_tied_head(self, embedding: str) -> None:
        """Raise InputError if a tied model's output head is stored too and is not its `embedding`.

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
            rule = f"holds a {HEAD} that is not {embedding}, though config.json says tie_word_embeddings=true"
            raise InputError("", self.path(HEAD), rule, "write false there, or delete the tensor")

    def part(self, unit: Unit, architecture: Architecture, rank: int, size: int) -> Rows:
        """Tensor-parallel `rank`'s part of a checkpoint tensor [layout.local_shape], vocabulary padding as zeros.

        Nothing is read before its rows are asked for.
        """
        slices = [self.slice(unit, index, architecture, rank, size) for index in range(len(unit.names))]
        local = rearranged(lambda parts: unit.layout.join(parts, architecture), slices)
        assert local.shape == local_shape(unit.parameter, architecture, size), (unit, local.shape)
        return local

    def slice(self, unit: Unit, index: int, architecture: Architecture, rank: int, size: int) -> Rows:
        """Tensor-parallel `rank`'s part of the `index`-th Hugging Face tensor of `unit`, padded like `part`."""
        name, axis = unit.names[index], unit.parameter.shard_axis or 0
        file, shape = self._file(name), list(unit.shapes(architecture)[index])
        if unit.parameter.shard_axis is None:
            rank, size = 0, 1
        full = architecture.padded_vocab_size if "vocab" in unit.parameter.axes else shape[axis]
        start, stop = (min(edge * full // size, shape[axis]) for edge in (rank, rank + 1))
        shape[axis] = full // size
        stored, dtype = file.dtype(name), self.dtype(name)

        def fill(target: torch.Tensor, row: int) -> None:
            local = target if stored == dtype else torch.empty(target.shape, dtype=stored)
            held = local
            if axis == 0:
                held = local[: max(0, min(stop - start - row, len(local)))]
                local[len(held) :].zero_()
                file.read_into(name, held, 0, start + row)
            else:
                file.read_into(name, held, axis, start, row)
            self.look(name, held)
            if local is not target:
                target.copy_(local)

        return Rows(tuple(shape), dtype, fill)
