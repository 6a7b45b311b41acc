"""The teacher runs ahead of the student: forward only, leaving final hidden states, never logits.

A token's hidden states are 8 KB where its logits would be 512 KB, and the student's schedule stays Megatron's own. So
the teacher may be laid over the ranks in its own way: only these states then travel (routes.py draws how).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.reader import TensorReader
from minitron_mcore.checkpoint.store import as_chunks, load_weights
from minitron_mcore.distillation.states.capture import Capture
from minitron_mcore.distillation.states.map import WIDE_SITES, Pair, holder
from minitron_mcore.distillation.teacher.placement import Placement, place
from minitron_mcore.distillation.teacher.routes import Grid, Moves, assign, state_moves, token_moves
from minitron_mcore.errors import InputError
from minitron_mcore.layout import axis_sizes, local_shape, parameter_table
from minitron_mcore.model.fp8 import Fp8
from minitron_mcore.model.gpt import LanguageModel, build_model, layout_of
from minitron_mcore.model.initialize import named_parameters
from minitron_mcore.model.microbatch import Microbatch, TeacherPart
from minitron_mcore.model.packing import Packed
from minitron_mcore.model.recompute import KEEP_ALL, Recompute
from minitron_mcore.model.schedule import final_hidden_states
from minitron_mcore.runtime.agree import all_or_none
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.runtime.groups import on_last_stage, tensor_group
from minitron_mcore.runtime.parallel import teacher_groups


class Teacher:
    """A frozen model in the student's ranks: no gradients, no optimizer, no DDP buffers, no dropout.

    chunks: this rank's chunks of it, in the layout their config names.
    student: the student's layout, where it is another; then also `groups`, the process groups of the teacher's own,
        and `head`, the teacher's output head in the student's shards [V / TP of the student, h] on its last stage.
    placed: what brings its layers in, where they are not resident.
    """

    def __init__(
        self,
        chunks: list[LanguageModel],
        architecture: Architecture,
        *,
        student: Grid | None = None,
        groups: ProcessGroupCollection | None = None,
        head: torch.Tensor | None = None,
        placed: Placement | None = None,
    ) -> None:
        self.chunks = chunks
        self.placed = placed
        self.architecture = architecture
        self.grid = Grid.of(layout_of(chunks[0].config), dist.get_world_size())
        self.student = student or self.grid
        self.groups = groups
        self._head = head
        self._capture: Capture | None = None
        # (site, teacher's layer, (the teacher's stage that has the state, a student's stage that needs it))
        self._states: list[tuple[str, int, tuple[int, int]]] = []

    @classmethod
    def load(
        cls,
        folder: Path,
        iteration: int,
        architecture: Architecture,
        parallel: ParallelConfig,
        precision: str,
        *,
        layout: ParallelConfig | None = None,
        placement: str = "resident",
        recompute: Recompute = KEEP_ALL,
        fp8: Fp8 | None = None,
    ) -> Teacher:
        """Build the teacher beside a student under `parallel` and fill it from a checkpoint of any layout.

        layout: the teacher's own; None or an equal one: the student's.
        placement: resident, sharded or offloaded (placement.py).
        precision: fp32, bf16, or fp8, which needs Transformer Engine.
        recompute, fp8: of the passes of a teacher that is to be trained, `fp8` beside bf16.

        Every rank calls, after `use_layout(parallel)`. Raises InputError where the checkpoint is of another
        architecture or damaged.
        """
        layout = layout or parallel
        world_size = dist.get_world_size()
        groups = teacher_groups(layout, world_size) if layout != parallel else None
        bare = placement != "resident"
        how: dict[str, Any] = {"bare_layers": bare, "recompute": recompute, "fp8": fp8}
        chunks = build_model(architecture, layout, precision, trainable=False, groups=groups, **how)
        if groups is not None and chunks[-1].post_process:
            del chunks[-1].output_layer  # the loss takes the head in the student's shards
        placed = place(chunks, placement, groups.dp_cp if groups is not None else None)
        load_weights(folder, iteration, as_chunks(chunks), architecture, placed.rows if placed else named_parameters)
        if groups is None:
            return cls(chunks, architecture, placed=placed)
        head = all_or_none(lambda: read_head(folder, iteration, architecture, chunks[0].config.params_dtype))
        return cls(chunks, architecture, student=Grid.of(parallel, world_size), groups=groups, head=head, placed=placed)

    def want_states(self, pairs: Sequence[Pair], student_layers: int) -> None:
        """From now on also leave the teacher's states of `pairs`; `student_layers`: how many layers the student has.

        Raises InputError for attention relations that the student's tensor-parallel ranks cannot share out.
        """
        if self._capture is not None:
            self._capture.close()
        groups, tensor = self.architecture.num_query_groups, self.student.tensor
        if any(pair.site not in WIDE_SITES for pair in pairs) and groups % tensor:
            rule = f"does not divide the teacher's num_query_groups={groups}, as the site attention_relation needs"
            remedy = "choose a divisor of it, or another site in distill.hidden_states.sites"
            raise InputError("parallel.tensor", tensor, rule, remedy)
        layers = self.architecture.num_layers

        def stages(pair: Pair) -> tuple[int, int]:
            here = self.grid.stage_of(holder(pair.site, pair.teacher_layer, layers), layers)
            return here, self.student.stage_of(holder(pair.site, pair.student_layer, student_layers), student_layers)

        self._states = list(dict.fromkeys((pair.site, pair.teacher_layer, stages(pair)) for pair in pairs))
        names = [(site, layer) for site, layer, _ in self._states]
        self._capture = Capture(as_chunks(self.chunks), names) if names else None

    def run_ahead(self, batch: list[Microbatch], *, train: bool = False) -> None:
        """Leave the final hidden states and those that `want_states` asked for in every microbatch, on the student's
        stages that need them: in the teacher's type, shared out over tensor-parallel ranks as the student's own.
        Every rank of the world calls, each with as many. train: for a TrainedTeacher alone."""
        for microbatch in batch:
            microbatch.teacher = TeacherPart()
        if self.student != self.grid:
            self._run_elsewhere(batch)
            return
        for microbatch, hidden in zip(batch, self._forward(batch, train), strict=False):  # none before the last stage
            microbatch.teacher.final = hidden
        if self._capture is not None:
            numbers = range(self._replica(self.grid), len(batch) * self.grid.data, self.grid.data)
            self._deliver_states(self._capture, batch, dict(zip(batch, numbers, strict=True)))

    def _run_elsewhere(self, batch: list[Microbatch]) -> None:
        """In a layout of the teacher's own: token ids travel there and states back, as routes.py has it. Only its first
        stage reads the token ids, but where the segments of packed rows lie is read by all."""
        grid, student, count = self.grid, self.student, len(batch)
        runs, replica = assign(student, grid, count), self._replica(grid)
        mine = {k * student.data + self._replica(student): _inputs(microbatch) for k, microbatch in enumerate(batch)}
        first = next(iter(mine.values()))
        moves = token_moves(student, grid, count, every_stage=batch[0].packed is not None)
        got = carry(moves, mine, tuple(first.shape), first.dtype)
        # To a stage that gets none, the token ids say no more than the shape.
        run = [_unlabelled(*got.get(number, first)) for number in runs.by_replica[replica]]
        counted = dict(zip(run, runs.by_replica[replica][: runs.counted[replica]], strict=False))
        held = dict(zip(counted.values(), self._forward(run, train=False), strict=False))
        last = grid.pipeline - 1, student.pipeline - 1
        for microbatch, hidden in self._delivered(batch, held, last, is_wide=True):
            microbatch.teacher.final = hidden
        if self._capture is not None:
            self._deliver_states(self._capture, batch, counted)

    def _deliver_states(self, capture: Capture, batch: list[Microbatch], ran: dict[Microbatch, int]) -> None:
        """Leave the inner states in `batch`. ran: what this rank's replica ran of it, and the numbers."""
        captured = dict(zip(ran.values(), capture.take(list(ran)), strict=True))
        for site, layer, stages in self._states:
            held = {number: states[site, layer] for number, states in captured.items() if (site, layer) in states}
            for microbatch, state in self._delivered(batch, held, stages, site in WIDE_SITES):
                microbatch.teacher.states[site, layer] = state

    def _delivered(
        self, batch: list[Microbatch], held: dict[int, torch.Tensor], stages: tuple[int, int], is_wide: bool
    ) -> Iterator[tuple[Microbatch, torch.Tensor]]:
        """A state of every microbatch, brought from the teacher's stage that has it to the student's that needs it, as
        routes.py has it. held: what this rank has, by the microbatch's number."""
        grid, student, (micro_batch, sequence) = self.grid, self.student, batch[0].tokens.shape
        split = (grid.sequence, student.sequence) if is_wide else (grid.tensor > 1, student.tensor > 1)
        shape = sequence, micro_batch, axis_sizes(self.architecture)["hidden" if is_wide else "qkv"]
        moves, dtype = state_moves(student, grid, len(batch), stages, split), self.chunks[0].config.params_dtype
        for number, tensor in carry(moves, held, shape, dtype, axis=0 if is_wide else 2).items():
            yield batch[number // student.data], tensor

    def _forward(self, run: list[Microbatch], train: bool) -> list[torch.Tensor]:
        """The final hidden states of every microbatch of `run`, on the teacher's last stage; elsewhere none."""
        begin = self._capture.begin if self._capture is not None else None
        with self.placed.passing(len(run)) if self.placed is not None else nullcontext():
            return final_hidden_states(self.chunks, run, begin=begin, groups=self.groups)

    def _replica(self, grid: Grid) -> int:
        """This rank's data-parallel place in a layout."""
        return grid.place(dist.get_rank()).data

    def head_weight(self) -> torch.Tensor:
        """This rank's shard of the teacher's head [V / TP, h], cut as the student's; the student's last stage only."""
        return self.chunks[-1].head_weight() if self._head is None else self._head


def _inputs(microbatch: Microbatch) -> torch.Tensor:
    """What the model reads: token ids, positions and, of packed rows, the segments' numbers, int64 [2 or 3, b, s]."""
    numbers = [] if microbatch.packed is None else [microbatch.packed.numbers()]
    return torch.stack([microbatch.tokens, microbatch.position_ids, *numbers])


def _unlabelled(tokens: torch.Tensor, position_ids: torch.Tensor, numbers: torch.Tensor | None = None) -> Microbatch:
    """A microbatch of `_inputs`."""
    packed = None if numbers is None else Packed.of(numbers)
    return replace(Microbatch.unlabelled(tokens, position_ids), packed=packed)


def carry(
    moves: Moves, held: Mapping[int, torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype, axis: int = 0
) -> dict[int, torch.Tensor]:
    """Carry out `moves`, as routes.py plans them; every rank that has a part in them calls, all with the same `moves`.

    held: microbatch -> this rank's part of its tensor, for what this rank is the source of.
    shape, dtype: of a whole tensor, cut along `axis`; the parts travel in `dtype`.

    Returns what this rank is to get, by microbatch: its part, or all of it. What it holds already is not copied.
    """
    rank, unit = dist.get_rank(), shape[axis] // moves.units
    mine = [move for move in moves.moves if rank in (move.source, move.destination)]
    arriving = defaultdict(list)
    for move in mine:
        if move.destination == rank:
            arriving[move.microbatch].append(move)
    results, ops, landed = {}, [], []
    for number, parts in arriving.items():
        size = list(shape)
        size[axis] = sum(part.stop - part.start for part in parts) * unit
        here = held[number] if len(parts) == 1 and parts[0].is_local else None
        if here is None or list(here.shape) != size or here.dtype != dtype:
            here = torch.empty(size, dtype=dtype, device=torch.cuda.current_device())
        results[number] = here
    for move in mine:
        start, length = move.start * unit, (move.stop - move.start) * unit
        if move.destination == rank:
            target = results[move.microbatch].narrow(axis, start - move.wanted * unit, length)
        if move.source == rank:
            part = held[move.microbatch].narrow(axis, start - move.held * unit, length).to(dtype)
            if move.destination != rank:
                ops.append(dist.P2POp(dist.isend, part.contiguous(), move.destination))
            elif target.data_ptr() != part.data_ptr():
                target.copy_(part)
            continue
        # Across another axis than the first, a part is no contiguous piece of memory.
        buffer = target if target.is_contiguous() else torch.empty_like(target, memory_format=torch.contiguous_format)
        ops.append(dist.P2POp(dist.irecv, buffer, move.source))
        if buffer is not target:
            landed.append((target, buffer))
    if ops:
        for work in dist.batch_isend_irecv(ops):
            work.wait()
    for target, buffer in landed:
        target.copy_(buffer)
    return results


def read_head(folder: Path, iteration: int, architecture: Architecture, dtype: torch.dtype) -> torch.Tensor | None:
    """The output head of a checkpoint (its embedding, where they are tied), in the shards of the current layout.

    [padded V / TP, h] on the last pipeline stage; None on the others, which read nothing.
    """
    if not on_last_stage():
        return None
    untied = architecture.untie_embeddings_and_output_weights
    key = "output_layer.weight" if untied else "embedding.word_embeddings.weight"
    parameter = next(parameter for parameter in parameter_table(architecture) if parameter.key == key)
    group = tensor_group()
    shape = local_shape(parameter, architecture, group.size())
    head = torch.empty(shape, dtype=dtype, device=torch.cuda.current_device())
    TensorReader(folder, iteration).fill_part(head, parameter, architecture, None, group.rank(), group.size())
    return head
