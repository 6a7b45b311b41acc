"""Which rank runs which microbatch of the teacher, and what then has to travel where. Pure: numbers, no process group.

Teacher and student lie on the same ranks, each in its own layout, in Megatron's rank order: tensor fastest, then
context, data, pipeline.

    student TP2 x DP2    ranks  0 1 | 2 3      each data-parallel replica reads its own microbatches
    teacher TP1 x DP4           0|1 | 2|3      rank 0 runs half of what ranks 0 and 1 hold

A window holds M microbatches of each student replica; microbatch k of replica r has the number k * DP + r, its place in
the global batch. A tensor of a microbatch is cut along one axis into `units` equal parts, the coarsest that serve both
sides' shards.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import lcm
from typing import NamedTuple

from minitron_mcore.layout import stage_of
from minitron_mcore.runtime.config import ParallelConfig


class Place(NamedTuple):
    """A rank's coordinates in a layout."""

    tensor: int
    context: int
    data: int
    pipeline: int


@dataclass(frozen=True)
class Grid:
    """A layout over a number of ranks. `sequence`: tensor-parallel ranks hold parts of the sequence between layers."""

    tensor: int
    context: int
    data: int
    pipeline: int
    virtual_pipeline: int | None = None
    sequence: bool = False

    @classmethod
    def of(cls, parallel: ParallelConfig, world_size: int) -> Grid:
        sizes = parallel.tensor, parallel.context, world_size // parallel.replica_ranks, parallel.pipeline
        return cls(*sizes, parallel.virtual_pipeline, parallel.sequence)

    def place(self, rank: int) -> Place:
        rank, tensor = divmod(rank, self.tensor)
        rank, context = divmod(rank, self.context)
        pipeline, data = divmod(rank, self.data)
        return Place(tensor, context, data, pipeline)

    def ranks(self, *, context: int | None = None, data: int | None = None, pipeline: int | None = None) -> list[int]:
        """Ranks, in order, whose coordinates are the given ones."""
        given = ((pipeline, self.pipeline), (data, self.data), (context, self.context))
        spans = [range(size) if at is None else (at,) for at, size in given]
        rows = [(p * self.data + d) * self.context + c for p, d, c in product(*spans)]
        return [row * self.tensor + tensor for row in rows for tensor in range(self.tensor)]

    def stage_of(self, layer: int, num_layers: int) -> int:
        """The pipeline stage that has a layer of a model of `num_layers`."""
        return stage_of(layer, num_layers, self.pipeline, self.virtual_pipeline)


@dataclass(frozen=True)
class Runs:
    """What each teacher replica runs: `by_replica[r]`, numbers of microbatches, equally many for every replica.

    The first `counted[r]` of them are wanted; the rest repeat one, so that all replicas run equally many (placements
    gather layers over the replicas) and an interleaved schedule gets a multiple of its stages.
    """

    by_replica: tuple[tuple[int, ...], ...]
    counted: tuple[int, ...]

    def homes(self) -> dict[int, int]:
        """Microbatch -> the teacher replica that runs it."""
        runs = enumerate(zip(self.by_replica, self.counted, strict=True))
        return {number: replica for replica, (numbers, count) in runs for number in numbers[:count]}


@lru_cache(maxsize=64)
def assign(student: Grid, teacher: Grid, microbatches: int) -> Runs:
    """Share out a window of `microbatches` a student replica.

    Student replica after student replica, so that a microbatch is mostly run by ranks that hold its tokens already:
    with equal layouts each replica runs its own, in order.
    """
    numbers = [k * student.data + r for r in range(student.data) for k in range(microbatches)]
    share = -(-len(numbers) // teacher.data)
    multiple = 1 if teacher.virtual_pipeline is None else teacher.pipeline
    length = -(-share // multiple) * multiple
    by_replica, counted = [], []
    for replica in range(teacher.data):
        mine = numbers[replica * share : (replica + 1) * share]
        counted.append(len(mine))
        by_replica.append(tuple(mine + [mine[-1] if mine else numbers[-1]] * (length - len(mine))))
    return Runs(tuple(by_replica), tuple(counted))


class Move(NamedTuple):
    """Part [start, stop) of a microbatch's tensor, in units of its cut axis, from one rank to another (or the same).

    `held`, `wanted`: where the parts begin that the source holds and the destination is to hold.
    """

    source: int
    destination: int
    microbatch: int
    start: int
    stop: int
    held: int
    wanted: int

    @property
    def is_local(self) -> bool:
        return self.source == self.destination


class Moves(NamedTuple):
    """Everything that travels, in one order for all ranks. `units`: into how many parts the axis is cut."""

    units: int
    moves: tuple[Move, ...]


@lru_cache(maxsize=64)
def token_moves(student: Grid, teacher: Grid, microbatches: int, *, every_stage: bool = False) -> Moves:
    """Token ids to every rank of the teacher's first stage, or of all stages, for what its replica runs, from any rank
    that has them."""
    moves = []
    for replica, numbers in enumerate(assign(student, teacher, microbatches).by_replica):
        for destination in teacher.ranks(data=replica, pipeline=None if every_stage else 0):
            tensor, context, _, _ = teacher.place(destination)
            for number in dict.fromkeys(numbers):
                holders = student.ranks(context=context, data=number % student.data)
                source = _source(holders, destination, tensor + number)
                moves.append(Move(source, destination, number, 0, 1, 0, 0))
    return Moves(1, tuple(moves))


@lru_cache(maxsize=64)
def state_moves(
    student: Grid, teacher: Grid, microbatches: int, stages: tuple[int, int], split: tuple[bool, bool]
) -> Moves:
    """A tensor of every microbatch from the teacher's stage that makes it to all ranks of a student's stage.

    `stages`: the teacher's and the student's. `split`: whether a tensor-parallel rank of the teacher holds, and one of
    the student is to hold, its own contiguous part of the cut axis, or all of it.
    """
    (teacher_stage, student_stage), (teacher_split, student_split) = stages, split
    has, wants = (teacher.tensor if teacher_split else 1), (student.tensor if student_split else 1)
    units = lcm(has, wants)
    homes = assign(student, teacher, microbatches).homes()
    moves = []
    for destination in student.ranks(pipeline=student_stage):
        tensor, context, data, _ = student.place(destination)
        wanted = units // wants * (tensor if student_split else 0)
        end = wanted + units // wants
        for number in range(data, microbatches * student.data, student.data):
            holders = teacher.ranks(context=context, data=homes[number], pipeline=teacher_stage)
            if not teacher_split:
                source = _source(holders, destination, tensor + number)
                moves.append(Move(source, destination, number, wanted, end, 0, wanted))
                continue
            for part, source in enumerate(holders):
                held = units // has * part
                start, stop = max(held, wanted), min(held + units // has, end)
                if start < stop:
                    moves.append(Move(source, destination, number, start, stop, held, wanted))
    return Moves(units, tuple(moves))


def _source(holders: list[int], destination: int, turn: int) -> int:
    """Itself where it can; else the holders take turns."""
    return destination if destination in holders else holders[turn % len(holders)]
