"""The scoring pass: forward only, all axes at once, at any tensor x pipeline x data parallel layout.

Every rank sums what it sees of its layers and shards; the parts are added up over all ranks at the end. During the pass
there is one small collective per microbatch, over tensor-parallel ranks and only under sequence parallelism; pipeline
stages work on different microbatches and never share one.

Legend: s sequence, b micro-batch, C channels on this rank, R rows (layers or norm sites), K sums, A sequence
aggregations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import numpy
import torch

from minitron_mcore.architecture import Architecture
from minitron_mcore.errors import InputError
from minitron_mcore.importance.aggregate import SampleSums, over_sequence, sequence_sums, sums_for
from minitron_mcore.importance.config import ImportanceConfig, variant_names
from minitron_mcore.importance.hooks import GROUPS, HEADS, HIDDEN, LAYERS, NEURON_SITES, Measure
from minitron_mcore.importance.scores import Scores
from minitron_mcore.model.gpt import LanguageModel
from minitron_mcore.model.microbatch import Microbatch
from minitron_mcore.model.schedule import evaluating, forward_only, in_calls
from minitron_mcore.runtime.groups import context_group, data_group, pipeline_group, tensor_group

_NONE = torch.iinfo(torch.int64).max

# Which measures, each with the sequence aggregations to keep.
Wanted = Mapping[Measure, Sequence[str]]


# What a pass leaves: (measure, aggregation over the batch, over the sequence) -> scores float64 [rows, channels] of the
# global model, the same on every rank.
Aggregate = Callable[[Measure, str, str], numpy.ndarray]


def score_model(
    chunks: Sequence[LanguageModel],
    batches: Iterable[Microbatch],
    architecture: Architecture,
    config: ImportanceConfig,
    *,
    settings: dict[str, Any] | None = None,
    report: Callable[[int], None] | None = None,
) -> Scores:
    """Scores of the global model from one pass over `batches`, as `config` asks; the same on every rank.

    Every rank calls with its chunks and its data-parallel rank's microbatches; see `measure` for these and `report`.
    Neurons, heads and KV groups are scored layer by layer, hidden channels by the sum over all norm sites, layers by
    their block influence averaged over all tokens. `config.aggregations` and `config.neuron_sites` add variants from
    the same sums. `config.depth_metrics` need passes of their own and are not measured here.

    Raises InputError for NaN or Inf in the activations.
    """
    primary, *others = variants = variant_names(config)
    sequence = list(dict.fromkeys(name.split("/")[1] for name in variants))
    sites = list(dict.fromkeys(name.split("/")[2] for name in variants))
    shared = (HIDDEN, HEADS, GROUPS, *(NEURON_SITES[site] for site in sites))
    wanted = {**dict.fromkeys(shared, sequence), LAYERS: ["mean"]}
    aggregate = measure(chunks, batches, architecture, wanted, report=report)
    said = {"importance": dataclasses.asdict(config), **(settings or {})}
    return Scores(
        architecture=architecture,
        **width_scores(aggregate, primary),
        layers=aggregate(LAYERS, "mean", "mean")[:, 0],
        settings=said,
        variants={name: width_scores(aggregate, name) for name in others},
    )


def width_scores(aggregate: Aggregate, variant: str) -> dict[str, Any]:
    """hidden, ffn, heads and groups of one choice "BATCH/SEQUENCE/SITE"."""
    batch, sequence, site = variant.split("/")
    return {
        "hidden": aggregate(HIDDEN, batch, sequence).sum(axis=0),
        "ffn": aggregate(NEURON_SITES[site], batch, sequence),
        "heads": aggregate(HEADS, batch, sequence),
        "groups": aggregate(GROUPS, batch, sequence),
    }


def measure(
    chunks: Sequence[LanguageModel],
    batches: Iterable[Microbatch],
    architecture: Architecture,
    wanted: Wanted,
    *,
    report: Callable[[int], None] | None = None,
) -> Aggregate:
    """One forward pass over `batches`, keeping the sums of every wanted measure.

    `batches`: microbatches on the device, as many on every rank and all of one size, `tokens` and `position_ids`
    [b, s] and, where some samples are fillers, `valid` [b] (0 for a filler, which does not count). All tokens of a
    sample count. `report` receives the number of this rank's finished microbatches. Every rank calls; all get the same.

    Raises InputError, on every rank, if activations are NaN or Inf, naming the layer and the samples.
    """
    assert context_group().size() == 1, "scoring needs whole sequences on a rank"
    collector = _Collector(chunks, architecture, wanted)
    done = 0
    with evaluating(chunks), collector.hooked():
        for group in in_calls(batches, interleaved=len(chunks) > 1):
            forward_only(list(chunks), group, lambda chunk, _, part: collector.finish_microbatch(chunk, part))
            collector.check_finite()
            done += sum(not microbatch.is_filler for microbatch in group)
            if report is not None:
                report(done)
    if not done:
        raise InputError("importance.num_samples", None, "must be at least 1", "give calibration samples to score")
    return collector.merge()


@cache
def _row_numbers(rows: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(rows, device=device)


class _Collector:
    """The hooks on this rank's chunks, their records of the current microbatch, and the sums so far."""

    def __init__(self, chunks: Sequence[LanguageModel], architecture: Architecture, wanted: Wanted) -> None:
        self.chunks, self.architecture, self.wanted = chunks, architecture, wanted
        self.tensor_rank, self.tensor_size = tensor_group().rank(), tensor_group().size()
        self.device = next(chunks[0].parameters()).device
        self.sums: dict[Measure, SampleSums] = {}
        for each, sequence in wanted.items():
            rows, channels = each.shape(architecture)
            local = channels // self.tensor_size if each.sharded else channels
            self.sums[each] = SampleSums(sequence, rows, local, self.device)
        self.num_samples = torch.zeros((), dtype=torch.float64, device=self.device)
        # Of the current microbatch: (row, tokens, sums [K, b, C]).
        self.recorded: dict[Measure, list[tuple[int, int, torch.Tensor]]] = {each: [] for each in wanted}
        self.rounds = {id(chunk): 0 for chunk in chunks}
        self.micro_batch_size = 0
        # Since the last look: sums over the channels, [R, b] of each measure and microbatch, and each row's place.
        self.totals: list[torch.Tensor] = []
        self.places: list[int] = []

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Within the `with` every wanted measure is recorded."""
        with ExitStack() as hooks:
            for each, sequence in self.wanted.items():
                for chunk in self.chunks:
                    for handle in each.attach(chunk, partial(self._record, each, sums_for(sequence))):
                        hooks.callback(handle.remove)
            yield

    def _record(self, each: Measure, names: Sequence[str], row: int, values_SBC: torch.Tensor) -> None:
        self.recorded[each].append((row, values_SBC.shape[0], sequence_sums(values_SBC, names)))

    def finish_microbatch(self, chunk: LanguageModel, microbatch: Microbatch) -> None:
        """Add what the hooks recorded while `chunk` ran `microbatch`. All tensor-parallel ranks are here at once."""
        valid_B = None if microbatch.valid is None else microbatch.valid.to(torch.float64)
        self.micro_batch_size = len(microbatch.tokens) if valid_B is None else len(valid_B)
        number = self.rounds[id(chunk)] * data_group().size() + data_group().rank()
        self.rounds[id(chunk)] += 1
        if chunk is self.chunks[0]:
            self.num_samples += self.micro_batch_size if valid_B is None else valid_B.sum()
        for index, (each, sequence) in enumerate(self.wanted.items()):
            if not self.recorded[each]:
                continue
            rows, lengths, sums = zip(*self.recorded[each], strict=True)
            self.recorded[each].clear()
            sums_KRBC, length = torch.stack(sums, dim=1).double(), lengths[0]
            if chunk.config.sequence_parallel and not each.sharded:
                torch.distributed.all_reduce(sums_KRBC, group=tensor_group())
                length *= self.tensor_size
            values_ARBC = over_sequence(sums_KRBC, sums_for(sequence), length, sequence)
            self.sums[each].add(values_ARBC, valid_B, _row_numbers(rows, self.device))
            # None is negative, so that a total is finite where all of it is.
            total_RB = values_ARBC.sum(dim=(0, -1))
            self.totals.append(total_RB if valid_B is None else total_RB.where(valid_B > 0, 0.0))
            # Microbatch, layer and measure as one number: the smallest is the earliest place in the earliest of them.
            places = (number * (self.architecture.num_layers + 1) + row // each.rows_per_layer for row in rows)
            self.places += [place * len(self.wanted) + index for place in places]

    def check_finite(self) -> None:
        """Raise InputError, on every rank, if any rank has seen NaN or Inf since the last call."""
        worst = torch.tensor(_NONE, device=self.device)
        if self.totals:
            is_bad = ~torch.cat([total_RB.sum(-1) for total_RB in self.totals]).isfinite()
            worst = torch.tensor(self.places, device=self.device).where(is_bad, _NONE).min()
        self.totals.clear()
        self.places.clear()
        torch.distributed.all_reduce(worst, op=torch.distributed.ReduceOp.MIN)
        if worst.item() == _NONE:
            return
        place, index = divmod(int(worst.item()), len(self.wanted))
        number, layer = divmod(place, self.architecture.num_layers + 1)
        where = "the final norm" if layer == self.architecture.num_layers else f"layer {layer} (the first is 0)"
        first = number * self.micro_batch_size
        samples = f"{first} to {first + self.micro_batch_size - 1}" if self.micro_batch_size > 1 else str(first)
        name = list(self.wanted)[index].name
        rule = f"are NaN or Inf ({name}) in microbatch {number}, calibration samples {samples}"
        raise InputError("", f"activations of {where}", rule, "check the checkpoint's weights, and precision")

    def merge(self) -> Aggregate:
        """Sums of the global model, on every rank: each contributes the part it owns, and zeros elsewhere."""
        answers = self.tensor_rank == 0
        merged = {}
        for each, sequence in self.wanted.items():
            local = self.sums[each].totals
            whole = SampleSums(sequence, *each.shape(self.architecture), device=self.device)
            if each.sharded:
                width = local.shape[-1]
                whole.totals[..., self.tensor_rank * width : (self.tensor_rank + 1) * width] = local
            elif answers:
                whole.totals.copy_(local)
            torch.distributed.all_reduce(whole.totals)
            merged[each] = whole
        count = self.num_samples * float(answers and pipeline_group().rank() == 0)
        torch.distributed.all_reduce(count)
        num_samples = float(count)

        @cache  # a variant may differ from another in its neurons alone
        def aggregate(what: Measure, batch: str, sequence: str) -> numpy.ndarray:
            return merged[what].over_batch(batch, sequence, num_samples).cpu().numpy()

        return aggregate
