"""The teacher runs ahead of the student: forward only, leaving final hidden states, never logits.

A token's hidden states are 8 KB where its logits would be 512 KB, and the student's schedule stays Megatron's own. So
the teacher may be laid over the ranks in its own way: only these states then travel (routes.py draws how).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.reader import TensorReader, all_or_none
from minitron_mcore.checkpoint.store import as_chunks, load_weights
from minitron_mcore.distillation.states.capture import Capture
from minitron_mcore.distillation.states.map import WIDE_SITES, Pair, holder
from minitron_mcore.distillation.teacher.placement import Placement, place
from minitron_mcore.distillation.teacher.routes import Grid, assign, state_moves, token_moves
from minitron_mcore.distillation.teacher.transfer import carry
from minitron_mcore.errors import InputError
from minitron_mcore.layout import axis_sizes, local_shape, parameter_table
from minitron_mcore.model.gpt import LanguageModel, build_model
from minitron_mcore.model.initialize import named_parameters
from minitron_mcore.model.recompute import KEEP_ALL, Recompute
from minitron_mcore.model.schedule import Begin, Microbatch, final_hidden_states
from minitron_mcore.runtime.config import ParallelConfig
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
        self.grid = _grid_of(chunks[0].config)
        self.student = student or self.grid
        self.groups = groups
        self._head = head
        self._capture: Capture | None = None
        # (site, teacher's layer, the teacher's stage that has the state, a student's stage that needs it)
        self._states: list[tuple[str, int, int, int]] = []

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
    ) -> Teacher:
        """Build the teacher beside a student under `parallel` and fill it from a checkpoint of any layout.

        layout: the teacher's own; None or an equal one: the student's.
        placement: resident, sharded or offloaded (placement.py).
        precision: fp32, bf16, or fp8, which needs Transformer Engine.
        recompute: of the training passes of a teacher that is to be trained.

        Every rank calls, after `use_layout(parallel)`. Raises InputError where the checkpoint is of another
        architecture or damaged.
        """
        layout = layout or parallel
        world_size = torch.distributed.get_world_size()
        groups = teacher_groups(layout, world_size) if layout != parallel else None
        bare = placement != "resident"
        chunks = build_model(
            architecture, layout, precision, trainable=False, groups=groups, bare_layers=bare, recompute=recompute
        )
        if groups is not None and chunks[-1].post_process:
            del chunks[-1].output_layer  # the loss takes the head in the student's shards
        placed = place(chunks, placement, groups.dp_cp if groups is not None else None)
        rows = placed.rows if placed else named_parameters
        load_weights(folder, iteration, as_chunks(chunks), architecture, rows)
        if groups is None:
            return cls(chunks, architecture, placed=placed)
        dtype = chunks[0].config.params_dtype
        head = all_or_none(lambda: read_head(folder, iteration, architecture, dtype))
        return cls(chunks, architecture, student=Grid.of(parallel, world_size), groups=groups, head=head, placed=placed)

    def want_states(self, pairs: Sequence[Pair], student_layers: int) -> None:
        """From now on also leave the teacher's states of `pairs`; `student_layers`: how many layers the student has.

        Raises InputError for attention relations that the student's tensor-parallel ranks cannot share out.
        """
        if self._capture is not None:
            self._capture.close()
        groups, tensor = self.architecture.num_query_groups, self.student.tensor
        if any(pair.site not in WIDE_SITES for pair in pairs) and groups % tensor:
            raise InputError(
                f"parallel.tensor={tensor} does not divide the teacher's num_query_groups={groups}, as "
                "distill.hidden_states.sites=[attention_relation] needs: choose a divisor of it, or another site"
            )
        wanted = dict.fromkeys(
            (
                pair.site,
                pair.teacher_layer,
                self.grid.stage_of(
                    holder(pair.site, pair.teacher_layer, self.architecture.num_layers), self.architecture.num_layers
                ),
                self.student.stage_of(holder(pair.site, pair.student_layer, student_layers), student_layers),
            )
            for pair in pairs
        )
        self._states = list(wanted)
        names = list(dict.fromkeys((site, layer) for site, layer, _, _ in wanted))
        self._capture = Capture(as_chunks(self.chunks), names) if names else None

    def run_ahead(self, batch: list[Microbatch]) -> None:
        """Leave the teacher's states in every microbatch; every rank of the world calls, each with as many.

        `teacher_hidden` [s, b, h], on the student's last stage; `teacher_states[site, layer]`, where `want_states`
        asked for them, on the student's stages that need them. In the teacher's type; shared out over tensor-parallel
        ranks as the student's own states are.
        """
        grid, student, count = self.grid, self.student, len(batch)
        replica = grid.place(torch.distributed.get_rank()).data
        runs = assign(student, grid, count)
        numbers, counted = runs.by_replica[replica], runs.counted[replica]
        run = self._microbatches(batch, numbers)
        begin = self._capture.begin if self._capture is not None else None
        hidden = self._forward(run, begin)

        micro_batch, sequence = batch[0]["tokens"].shape
        shape = (sequence, micro_batch, self.architecture.hidden_size)
        dtype = self.chunks[0].config.params_dtype
        moves = state_moves(
            student, grid, count, grid.pipeline - 1, student.pipeline - 1, grid.sequence, student.sequence
        )
        held = dict(zip(numbers[:counted], hidden, strict=False))
        for number, tensor in carry(moves, held, shape, dtype).items():
            batch[number // student.data]["teacher_hidden"] = tensor
        captured = [microbatch.pop("captured", {}) for microbatch in run[:counted]]
        for site, layer, stage, student_stage in self._states:
            wide = site in WIDE_SITES
            split = (grid.sequence, student.sequence) if wide else (grid.tensor > 1, student.tensor > 1)
            moves = state_moves(student, grid, count, stage, student_stage, *split)
            held = {
                number: states[site, layer]
                for number, states in zip(numbers, captured, strict=False)
                if (site, layer) in states
            }
            width = shape if wide else (*shape[:2], axis_sizes(self.architecture)["qkv"])
            for number, tensor in carry(moves, held, width, dtype, axis=0 if wide else 2).items():
                batch[number // student.data].setdefault("teacher_states", {})[site, layer] = tensor

    def _forward(self, run: list[Microbatch], begin: Begin | None) -> list[torch.Tensor]:
        """The final hidden states of every microbatch of `run`, on the teacher's last stage; elsewhere none."""
        with self.placed.passing(len(run)) if self.placed is not None else nullcontext():
            return final_hidden_states(as_chunks(self.chunks), run, begin, groups=self.groups)

    def _microbatches(self, batch: list[Microbatch], numbers: Sequence[int]) -> list[Microbatch]:
        """What this rank's replica of the teacher is to run: tokens and position_ids [b, s].

        Only the first stage reads them; to the others they say no more than the shape.
        """
        student = self.student
        replica = student.place(torch.distributed.get_rank()).data
        mine = {
            k * student.data + replica: torch.stack((microbatch["tokens"], microbatch["position_ids"]))
            for k, microbatch in enumerate(batch)
        }
        first = next(iter(mine.values()))
        moves = token_moves(student, self.grid, len(batch))
        got = carry(moves, mine, tuple(first.shape), first.dtype)
        return [dict(zip(("tokens", "position_ids"), got.get(number, first), strict=True)) for number in numbers]

    def head_weight(self) -> torch.Tensor:
        """This rank's shard of the teacher's head [V / TP, h], cut as the student's; the student's last stage only."""
        return self.chunks[-1].head_weight() if self._head is None else self._head


def read_head(folder: Path, iteration: int, architecture: Architecture, dtype: torch.dtype) -> torch.Tensor | None:
    """The output head of a checkpoint (its embedding, where they are tied), in the shards of the current layout.

    [padded V / TP, h] on the last pipeline stage; None on the others, which read nothing.
    """
    if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        return None
    untied = architecture.untie_embeddings_and_output_weights
    key = "output_layer.weight" if untied else "embedding.word_embeddings.weight"
    parameter = next(parameter for parameter in parameter_table(architecture) if parameter.key == key)
    group = parallel_state.get_tensor_model_parallel_group()
    shape = local_shape(parameter, architecture, group.size())
    head = torch.empty(shape, dtype=dtype, device=torch.cuda.current_device())
    TensorReader(folder, iteration).fill_part(head, parameter, architecture, None, group.rank(), group.size())
    return head


def _grid_of(config: TransformerConfig) -> Grid:
    parallel = ParallelConfig(
        tensor=config.tensor_model_parallel_size,
        pipeline=config.pipeline_model_parallel_size,
        virtual_pipeline=config.virtual_pipeline_model_parallel_size,
        context=config.context_parallel_size,
        sequence=config.sequence_parallel,
    )
    return Grid.of(parallel, torch.distributed.get_world_size())
