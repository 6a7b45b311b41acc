"""What a reference makes of every segment: its log-probability, worked out once, before training, and kept in a file.

    DIR/reference.json       how it was made (`facts`), how many segments, a checksum of what is there
    DIR/reference.npy        float64 [segments]: log-probability of the segment's counted tokens, summed
    DIR/block-000000.npy     the same of BLOCK segments from there on, until all blocks are finished

Segments are worked out block by block, so that a killed pass loses one block; the blocks, and what goes into a pass
through the model, do not depend on which were there already: a pass that goes on gives the same bits. So does every
layout up to rounding: sums over tokens and data-parallel ranks are in float64.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch
import xxhash
from torch import Tensor

from minitron_mcore.alignment.token_losses import token_losses
from minitron_mcore.distillation.logits.settings import LossSettings
from minitron_mcore.errors import InputError
from minitron_mcore.evaluation.likelihood import input_batches, rows_group
from minitron_mcore.evaluation.token_values import over_world
from minitron_mcore.files import reading, whole_file, write_whole, writing
from minitron_mcore.model.gpt import LanguageModel
from minitron_mcore.model.microbatch import Microbatch, on_this_context_rank
from minitron_mcore.model.schedule import in_calls, visit_final_states
from minitron_mcore.runtime.groups import context_group, data_place, tensor_group
from minitron_mcore.runtime.interrupt import made_progress
from minitron_mcore.runtime.start import Runtime

BLOCK = 1024  # segments
FORMAT = 1
_VALUES, _SAID = "reference.npy", "reference.json"


class Prepared(Protocol):
    """Segments one after another, as chats and preferences are prepared (data/chat/)."""

    @property
    def tokens(self) -> numpy.ndarray: ...  # int32 [tokens of all segments]

    @property
    def counted(self) -> numpy.ndarray: ...  # bool, likewise

    @property
    def starts(self) -> numpy.ndarray: ...  # int64 [segments + 1]


@dataclass(frozen=True)
class Segment:
    """One segment as `input_batches` takes it: as long as what the model reads, all tokens but the last."""

    tokens: numpy.ndarray  # [n]
    counted: numpy.ndarray  # [n]

    @classmethod
    def of(cls, prepared: Prepared, number: int) -> Segment:
        part = slice(int(prepared.starts[number]), int(prepared.starts[number + 1]))
        return cls(numpy.asarray(prepared.tokens[part]), numpy.asarray(prepared.counted[part]))

    def __len__(self) -> int:
        return len(self.tokens) - 1

    def sample(self, length: int) -> dict[str, Tensor]:
        """Padded on the right to `length`: token i has the label i + 1, which counts where that token does."""
        tokens, labels = (torch.zeros(length, dtype=torch.int64) for _ in range(2))
        tokens[: len(self)] = torch.from_numpy(self.tokens[:-1].astype(numpy.int64))
        labels[: len(self)] = torch.from_numpy(self.tokens[1:].astype(numpy.int64))
        mask = torch.zeros(length)
        mask[: len(self)] = torch.from_numpy(self.counted[1:].astype(numpy.float32))
        return {"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": torch.arange(length)}


@dataclass
class Said:
    """What reference.json holds."""

    facts: dict[str, Any]
    segments: int
    block: int
    blocks: dict[str, str] = field(default_factory=dict)  # number of a finished block -> its values' checksum
    values: str | None = None  # checksum of all values, once all blocks are finished
    format: int = FORMAT

    @classmethod
    def read(cls, folder: Path) -> Said | None:
        """None where there is none, or of another format."""
        if not (folder / _SAID).is_file():
            return None
        with reading(str(folder / _SAID)):
            content = (folder / _SAID).read_text(encoding="utf-8")
        try:
            return cls(**json.loads(content))
        except (ValueError, TypeError):
            return None

    def is_of(self, facts: dict[str, Any], segments: int) -> bool:
        return self.format == FORMAT and self.segments == segments and self.facts == json.loads(json.dumps(facts))

    def write(self, folder: Path) -> None:
        write_whole(folder / _SAID, json.dumps(asdict(self), indent=1) + "\n")


def read_reference(folder: Path, facts: dict[str, Any], segments: int) -> numpy.ndarray | None:
    """float64 [segments] of what `facts` describe; None where it is not there, not finished, or of other facts. Any
    rank calls. Raises InputError where it is damaged."""
    said = Said.read(folder)
    if said is None or said.values is None or not said.is_of(facts, segments):
        return None
    values = _load(folder / _VALUES, segments)
    if values is None or _checksum(values) != said.values:
        rule = "is damaged: it does not have the checksum that it was written with"
        raise InputError("", folder / _VALUES, rule, f"delete the folder {folder}, and it is worked out again")
    return values


def work_out_reference(
    chunks: Sequence[LanguageModel],
    prepared: Prepared,
    folder: Path,
    facts: dict[str, Any],
    runtime: Runtime,
    settings: LossSettings,
    *,
    micro_batch_size: int = 1,
    block: int = BLOCK,
) -> numpy.ndarray:
    """float64 [segments]: the log-probability of each segment's counted tokens by the model in `chunks`, summed, in
    nats; every rank calls, after `use_layout`, and gets all of them. What `folder` has already is not worked out again.

    facts: what the values follow from, but for the layout: plain data, as a JSON file holds them. settings: its
    `vocab_size` and `chunk_tokens`. Raises InputError, on every rank, where `folder` cannot be written, and where the
    model gives NaN or Inf.
    """
    count = len(prepared.starts) - 1
    found: numpy.ndarray | None = runtime.on_main(partial(read_reference, folder, facts, count))
    if found is not None:
        return found
    said = runtime.on_main(partial(_begin, folder, Said(facts, count, block)))
    starts = range(0, count, block)
    total = int(prepared.starts[-1])
    done = sum(_tokens(prepared, start, block) for start in starts if str(start // block) in said.blocks)
    with runtime.progress(total, "tokens", "reference", done=done) as bar:
        for start in starts:
            if str(start // block) in said.blocks:
                continue
            numbers = range(start, min(start + block, count))
            values = segment_log_probs(chunks, prepared, numbers, settings, micro_batch_size=micro_batch_size)
            _refuse_not_finite(values, start)
            runtime.on_main(partial(_write_block, folder, said, start // block, values))
            made_progress()
            bar.advance(_tokens(prepared, start, block))
    whole: numpy.ndarray = runtime.on_main(partial(_finish, folder, said))
    return whole


def segment_log_probs(
    chunks: Sequence[LanguageModel],
    prepared: Prepared,
    numbers: Sequence[int],
    settings: LossSettings,
    *,
    micro_batch_size: int = 1,
) -> numpy.ndarray:
    """float64 [segments]: of the segments `numbers` what `work_out_reference` gives of all. Every rank calls."""
    device = next(chunks[0].parameters()).device
    segments = [Segment.of(prepared, number) for number in numbers]
    totals = torch.zeros(len(segments), dtype=torch.float64, device=device)

    def visit(chunk: LanguageModel, hidden_SBH: Tensor, microbatch: Microbatch) -> None:
        assert microbatch.samples is not None
        labels_SB, counted_SB = microbatch.labels.transpose(0, 1), microbatch.loss_mask.transpose(0, 1) > 0
        how: Any = {"tp_group": tensor_group(), "sequence_parallel": chunk.config.sequence_parallel}
        losses_SB = token_losses(hidden_SBH, chunk.head_weight(), labels_SB, counted_SB, settings, **how)
        totals.index_add_(0, microbatch.samples, -losses_SB.double().sum(0))

    parts, is_split = context_group().size(), chunks[0].config.sequence_parallel
    multiple = (2 * parts if parts > 1 else 1) * (tensor_group().size() if is_split else 1)
    sizes = micro_batch_size, rows_group(), multiple
    for batches in input_batches(segments, *sizes, Segment.sample, **data_place()):
        stream = (on_this_context_rank(microbatch).to(device) for microbatch in batches)
        for call in in_calls(stream, interleaved=len(chunks) > 1):
            visit_final_states(list(chunks), call, visit)
    values: numpy.ndarray = over_world(totals, chunks).cpu().numpy()
    return values


def _tokens(prepared: Prepared, start: int, block: int) -> int:
    end = min(start + block, len(prepared.starts) - 1)
    return int(prepared.starts[end] - prepared.starts[start])


def _begin(folder: Path, wanted: Said) -> Said:
    """Which blocks of what is wanted are there already; one process calls."""
    with writing(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        said = Said.read(folder)
        if said is not None and said.is_of(wanted.facts, wanted.segments) and said.block == wanted.block:
            for number, checksum in said.blocks.items():
                values = _load(_block_file(folder, int(number)), _length(wanted, int(number)))
                if values is not None and _checksum(values) == checksum:
                    wanted.blocks[number] = checksum
        wanted.write(folder)
    return wanted


def _write_block(folder: Path, said: Said, number: int, values: numpy.ndarray) -> None:
    with writing(str(folder)):
        _save(_block_file(folder, number), values)
        said.blocks[str(number)] = _checksum(values)
        said.write(folder)


def _finish(folder: Path, said: Said) -> numpy.ndarray:
    """All blocks as one file; one process calls."""
    files = [_block_file(folder, number) for number in range(-(-said.segments // said.block))]
    with writing(str(folder)):
        values = numpy.concatenate([numpy.zeros(0), *map(numpy.load, files)])
        _save(folder / _VALUES, values)
        said.blocks, said.values = {}, _checksum(values)
        said.write(folder)
        for file in files:
            file.unlink()
    return values


def _block_file(folder: Path, number: int) -> Path:
    return folder / f"block-{number:06d}.npy"


def _length(said: Said, number: int) -> int:
    """Segments of a block."""
    return min(said.block, said.segments - number * said.block)


def _save(path: Path, values: numpy.ndarray) -> None:
    with whole_file(path) as partial_file, partial_file.open("wb") as stream:
        numpy.save(stream, values)


def _load(path: Path, length: int) -> numpy.ndarray | None:
    """float64 [length]; None where the file holds something else, or is not there."""
    try:
        values: Any = numpy.load(path)
    except (OSError, ValueError, EOFError):
        return None
    is_array = isinstance(values, numpy.ndarray)  # not a .npz under another name
    return values if is_array and values.shape == (length,) and values.dtype == numpy.float64 else None


def _checksum(values: numpy.ndarray) -> str:
    return xxhash.xxh3_64_hexdigest(values.tobytes())


def _refuse_not_finite(values: numpy.ndarray, start: int) -> None:
    bad = numpy.flatnonzero(~numpy.isfinite(values))
    if len(bad):
        number = start + int(bad[0])
        rule = f"gives log-probabilities that are NaN or Inf in segment {number} of the data"
        raise InputError("align.load", None, rule, "check its weights and the precision")
