"""Megatron checkpoint -> Hugging Face folder, a few blocks in memory at a time, on as many threads.

    HF/config.json, generation_config.json, README.md
    HF/model.safetensors, or model-00001-of-0000N.safetensors … with model.safetensors.index.json
    HF/tokenizer.json …
    HF/manifest.json                  a checksum of every tensor and every small file (see manifest.py)

The first rank reads and writes; the others wait, file by file. The folder appears whole, or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from minitron_mcore.checkpoint.blocks import Rows, rearranged
from minitron_mcore.checkpoint.companions import token_ids, tokenizer_class, write_companions
from minitron_mcore.checkpoint.conversion import Unit, units
from minitron_mcore.checkpoint.folder import read_architecture
from minitron_mcore.checkpoint.hf_config import INDEX, SINGLE
from minitron_mcore.checkpoint.manifest import StoredPiece, type_name, write_manifest
from minitron_mcore.checkpoint.reader import TensorReader
from minitron_mcore.checkpoint.safetensors_file import Entry, split_files, write_safetensors
from minitron_mcore.errors import InputError
from minitron_mcore.families.find import known_families
from minitron_mcore.families.table import config_of
from minitron_mcore.files import writing
from minitron_mcore.runtime.libraries import imported
from minitron_mcore.runtime.progress import Bar
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.runtime.whole_folder import whole_folder

MAX_SHARD_BYTES = 5_000_000_000


def export_checkpoint(
    folder: Path,
    iteration: int,
    target: Path,
    runtime: Runtime,
    *,
    card: Callable[[], str] | None = None,
    bos: int | None = None,
    eos: int | None = None,
    save_tokenizer: Callable[[Path], None] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the finished iteration of `folder`, saved at any layout, as the Hugging Face folder `target`.

    Weights keep their stored dtype; the vocabulary's padding is removed. `card` gives the text of README.md; None: no
    such file. `bos` and `eos` are the tokenizer's marks, `save_tokenizer` writes its files into a folder; without all
    three, the folder names the marks that its source named. All ranks call, whatever the layout; no model-parallel
    groups are needed. A `target` that is there is replaced. Raises InputError, on every rank and with nothing written,
    if it cannot be written, or if transformers refuses the shape.
    """
    marks = {} if (bos, eos, save_tokenizer) == (None, None, None) else {"bos_token_id": bos, "eos_token_id": eos}
    job = _Export(folder, iteration, target, max_shard_bytes, marks)
    num_files, size = runtime.on_main(job.begin)
    with whole_folder(target, f"hf={target}") as place:
        with runtime.progress(size, "B", "export") as bar:
            for number in range(num_files):
                runtime.on_main(partial(job.write_weights, place, number, bar))
        runtime.on_main(partial(job.finish, place, card, save_tokenizer))


@dataclass
class _Export:
    """The first rank's work; `export_checkpoint` calls its methods in order."""

    folder: Path
    iteration: int
    target: Path
    max_shard_bytes: int
    marks: dict[str, int | None]  # of the tokenizer's own
    stored: list[StoredPiece] = field(default_factory=list)

    def begin(self) -> tuple[int, int]:
        """Refuse what cannot be exported; returns the number of weight files, and their bytes."""
        self.architecture = read_architecture(self.folder)
        self.config = config_of(known_families()[self.architecture.family], self.architecture, f"hf={self.target}")
        _ask_transformers(self.config, self.target)
        self.reader = TensorReader(self.folder, self.iteration)
        self.units = units(self.architecture)
        entries = [
            Entry(name, shape, self.reader.dtype(unit.parameter.key))
            for unit in self.units
            for name, shape in zip(unit.names, unit.shapes(self.architecture), strict=True)
        ]
        self.files = split_files(entries, self.max_shard_bytes)
        count = len(self.files)
        numbered = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
        self.names = numbered if count > 1 else [SINGLE]
        self.stream = self._tensors()
        return count, sum(entry.num_bytes for entry in entries)

    def write_weights(self, place: Path, number: int, bar: Bar) -> None:
        """One safetensors file. One parameter makes several tensors, so the stream continues across files."""
        entries, path = self.files[number], place / self.names[number]
        with writing(f"hf={self.target}"):
            self.stored += write_safetensors(path, entries, list(islice(self.stream, len(entries))), bar.advance)

    def finish(
        self, place: Path, card: Callable[[], str] | None, save_tokenizer: Callable[[Path], None] | None
    ) -> None:
        """Write what lies beside the weights."""
        marks = token_ids(self.folder, self.marks)
        dtype = {"torch_dtype": type_name(self.files[0][0].dtype)}
        size = sum(entry.num_bytes for entries in self.files for entry in entries)
        places = {entry.name: name for name, entries in zip(self.names, self.files, strict=True) for entry in entries}
        config = {**self.config, **marks, **tokenizer_class(self.folder), **dtype, "use_cache": True}
        documents: dict[str, Any] = {"config.json": config}
        if len(self.files) > 1:
            documents[INDEX] = {"metadata": {"total_size": size}, "weight_map": places}
        with writing(f"hf={self.target}"):
            for name, content in documents.items():
                (place / name).write_text(json.dumps(content, indent=2) + "\n")
            if card is not None:
                (place / "README.md").write_text(card(), encoding="utf-8")
            write_companions(self.folder, place, marks)
            if save_tokenizer is not None:
                save_tokenizer(place)
            write_manifest(place, self.stored)

    def _tensors(self) -> Iterator[Rows]:
        for unit in self.units:
            stored = self.reader.rows(unit.parameter.key, unit.layer, unit.parameter.shape(self.architecture))
            for index in range(len(unit.names)):
                yield rearranged(partial(self._split, unit, index), [stored])

    def _split(self, unit: Unit, index: int, parts: list[torch.Tensor]) -> torch.Tensor:
        return unit.layout.split(parts[0], self.architecture)[index]


def _ask_transformers(config: dict[str, Any], target: Path) -> None:
    """The installed transformers checks a config as it is made: better now than when the folder is loaded."""
    transformers = imported("transformers")
    try:
        transformers.AutoConfig.for_model(**config)
    except Exception as error:
        rule = f"cannot be written: transformers refuses a model of this shape: {' '.join(str(error).split())}"
        raise InputError("hf", target, rule) from error
