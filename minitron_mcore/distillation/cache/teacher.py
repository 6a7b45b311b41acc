"""A teacher whose targets are read from a cache in place of a forward pass.

Legend: S sequence (this rank's part of it under context parallelism), b micro-batch, K ids a token.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from minitron_mcore.architecture import Architecture, build_architecture
from minitron_mcore.distillation.cache.file import CacheReader, Targets, has_tails, token_checksum
from minitron_mcore.distillation.cache.serving import holds_all
from minitron_mcore.distillation.config import CACHE
from minitron_mcore.distillation.logits.sparse_target import SparseTarget
from minitron_mcore.errors import InputError
from minitron_mcore.model.microbatch import Microbatch, TeacherPart
from minitron_mcore.runtime.agree import all_or_none
from minitron_mcore.runtime.groups import context_group, context_part, on_last_stage

PROBES = 8  # samples whose tokens are compared before the first step; each one is, once it is read
READERS = 4  # threads that decode: zlib and NumPy release Python's lock


class CachedTeacher:
    """The targets of a cache in place of a teacher: without a head, hidden states or validation samples."""

    def __init__(self, folder: Path, temperature: float) -> None:
        """temperature: of the loss. Every rank calls. Raises InputError if `folder` holds no cache."""
        self.reader = CacheReader(folder)
        settings = self.reader.settings
        self.architecture: Architecture = build_architecture(settings["teacher"]["architecture"])
        self.is_drawn = settings["method"] == "sampled"
        self.is_whole = holds_all(settings)
        # A whole distribution at one temperature gives that at any other: all its probabilities to this power.
        self.exponent = settings["temperature"] / temperature
        self._threads = ThreadPoolExecutor(READERS)
        self._ahead: dict[int, Future[Targets]] = {}
        self._last_first: int | None = None

    def run_ahead(self, batch: list[Microbatch], *, train: bool = False) -> None:
        """Leave a SparseTarget in every microbatch, on the student's last stage; every rank of the world calls.

        Looked up by the microbatch's `samples`. Raises InputError, on every rank if on one, for targets that are
        missing, damaged, or of other tokens. train: has no effect here.
        """
        all_or_none(lambda: self._read(batch) if on_last_stage() else None)

    def _read(self, batch: list[Microbatch]) -> None:
        numbers = [microbatch.samples.tolist() for microbatch in batch if microbatch.samples is not None]
        rank, size, device = context_group().rank(), context_group().size(), batch[0].tokens.device

        def here(whole: Tensor) -> Tensor:
            return context_part(whole, 0, rank, size).contiguous().to(device, non_blocking=True)

        found = self._load(list(itertools.chain(*numbers)))
        for microbatch, samples in zip(batch, numbers, strict=True):
            if size == 1:
                self._check_tokens(samples, microbatch.tokens)
            target = self.stack([future.result() for future in itertools.islice(found, len(samples))])
            microbatch.teacher = TeacherPart(target.each(here))

    def _load(self, samples: list[int]) -> Iterator[Future[Targets]]:
        """The targets of `samples`, in order. Also starts to decode what the student will want next: as many samples,
        as far ahead of these as these are of the previous ones."""
        begun, self._ahead = self._ahead, {}
        found = [begun.get(sample) or self._threads.submit(self._decode, sample) for sample in samples]
        for sample in begun.keys() - set(samples):
            begun[sample].cancel()
        distance = samples[0] - self._last_first if self._last_first is not None else 0
        self._last_first = samples[0]
        held = range(self.reader.settings["num_samples"])
        coming = [sample + distance for sample in samples if distance and sample + distance in held]
        self._ahead = {sample: self._threads.submit(self._decode, sample) for sample in coming}
        return iter(found)

    def _decode(self, sample: int) -> Targets:
        targets = self.reader.read(sample)
        return Targets(targets.num_ids, targets.ids, None, log_weights(targets), targets.tails)

    def _check_tokens(self, samples: list[int], tokens_bS: Tensor) -> None:
        for sample, tokens_S in zip(samples, tokens_bS.cpu().numpy(), strict=True):
            if token_checksum(tokens_S) != self.reader.tokens_of(sample):
                rule = f"was made from other data, or in another order: its sample {sample} has other tokens"
                remedy = "give the data and the seed it was made with, or make it again"
                raise InputError("distill.teacher", f"{CACHE}{self.reader.folder}", rule, remedy)

    def check_dataset(self, dataset: Any, needed: int) -> None:
        """Raise InputError if samples among the first `needed` of `dataset` have other tokens. Any rank calls."""
        for sample in sorted({round(i * (needed - 1) / max(PROBES - 1, 1)) for i in range(PROBES)}):
            self._check_tokens([sample], torch.as_tensor(dataset[sample]["tokens"]).unsqueeze(0))

    def stack(self, samples: Sequence[Targets]) -> SparseTarget:
        """The targets of b samples side by side, [S, b, K], on the host; K: the most ids of a token.

        Log-probabilities that were rounded are shifted, a tail's too, so that they are of a distribution again.
        """
        settings = self.reader.settings
        shape = (len(samples), len(samples[0].num_ids), max(1, *(int(targets.num_ids.max()) for targets in samples)))
        ids = numpy.full(shape, -1, dtype=numpy.int64)
        log_probs = numpy.zeros(shape, dtype=numpy.float32)
        for row, targets in enumerate(samples):
            used = numpy.arange(shape[2]) < targets.num_ids[:, None]
            ids[row][used] = targets.ids
            log_probs[row][used] = log_weights(targets)
        target_ids, target_log_probs = (torch.from_numpy(whole).transpose(0, 1) for whole in (ids, log_probs))
        log_tail, is_rounded = None, settings["dtype"] != "fp32"
        if has_tails(settings):
            log_tail = torch.stack([torch.from_numpy(targets.tails) for targets in samples], dim=1)
            if is_rounded:
                total = torch.logaddexp(target_log_probs.logsumexp(-1), log_tail)
                target_log_probs, log_tail = target_log_probs - total.unsqueeze(-1), log_tail - total
        elif self.is_whole and (self.exponent != 1.0 or is_rounded):
            target_log_probs = torch.log_softmax(target_log_probs * self.exponent, dim=-1)
        return SparseTarget(target_ids, target_log_probs, not self.is_drawn, log_tail, self.is_drawn)


def log_weights(targets: Targets) -> numpy.ndarray:
    """For each id, fp32 [E]: the stored log-probability, or log(n_v / n) + log p/q of what was drawn."""
    if targets.counts is None:
        assert targets.values is not None
        return targets.values
    token_E = numpy.repeat(numpy.arange(len(targets.num_ids)), targets.num_ids)
    drawn = numpy.bincount(token_E, weights=targets.counts, minlength=len(targets.num_ids))
    logs = numpy.log(targets.counts / drawn[token_E])
    return (logs if targets.values is None else logs + targets.values).astype(numpy.float32)
