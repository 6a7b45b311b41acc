"""Every piece of the teacher's states arrives exactly once wherever the student needs it, at all layouts up to 8 ranks.

Checked by filling arrays with what each rank holds and carrying out the moves as numbers, without a process group.
"""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron_mcore.distillation.teacher.routes import Grid, Moves, assign, state_moves, token_moves


def grids_of(world_size: int, context: int) -> list[Grid]:
    sizes = range(1, world_size + 1)
    return [
        Grid(tensor, context, world_size // (tensor * context * pipeline), pipeline, virtual, sequence)
        for tensor in sizes
        for pipeline in sizes
        if world_size % (tensor * context * pipeline) == 0
        for virtual in ([None, 2] if pipeline > 1 else [None])
        for sequence in ([False, True] if tensor > 1 else [False])
    ]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Grid, Grid, int]:
    """Student, teacher, microbatches of a window."""
    world_size = draw(st.integers(1, 8))
    context = draw(st.sampled_from([size for size in (1, 2) if world_size % size == 0]))
    grids = st.sampled_from(grids_of(world_size, context))
    return draw(grids), draw(grids), draw(st.integers(1, 5))


@pytest.mark.parametrize("world_size", [1, 2, 4, 6, 8])
def test_places_are_megatrons(world_size: int) -> None:
    from megatron.core.parallel_state import RankGenerator

    for context in (1, 2):
        for grid in grids_of(world_size, context) if world_size % context == 0 else []:
            generator = RankGenerator(grid.tensor, 1, grid.data, grid.pipeline, grid.context, "tp-cp-ep-dp-pp")
            for index, axis in enumerate(("tp", "cp", "dp", "pp")):
                for ranks in generator.get_ranks(axis):
                    assert [grid.place(rank)[index] for rank in ranks] == list(range(len(ranks)))
            for rank in range(world_size):
                tensor, context_place, data, pipeline = grid.place(rank)
                assert grid.ranks(context=context_place, data=data, pipeline=pipeline)[tensor] == rank
            assert grid.ranks() == list(range(world_size))


@settings(max_examples=100, deadline=None)
@given(cases())
def test_every_microbatch_is_run_once(case: tuple[Grid, Grid, int]) -> None:
    student, teacher, count = case
    runs = assign(student, teacher, count)
    counted = [number for run, keep in zip(runs.by_replica, runs.counted, strict=True) for number in run[:keep]]
    assert sorted(counted) == list(range(count * student.data))
    assert len(runs.by_replica) == teacher.data
    assert len({len(run) for run in runs.by_replica}) == 1, "replicas that gather layers together run equally many"
    length = len(runs.by_replica[0])
    if teacher.virtual_pipeline is not None:
        assert length % teacher.pipeline == 0
    needed = -(-count * student.data // teacher.data)
    assert length < needed + (teacher.pipeline if teacher.virtual_pipeline else 1), "no more fillers than needed"


@settings(max_examples=100, deadline=None)
@given(cases())
def test_tokens_reach_who_embeds_them(case: tuple[Grid, Grid, int]) -> None:
    student, teacher, count = case
    moves = token_moves(student, teacher, count)
    got = Counter((move.destination, move.microbatch) for move in moves.moves)
    assert set(got.values()) == {1}
    runs = assign(student, teacher, count)
    for rank in teacher.ranks():
        place = teacher.place(rank)
        wanted = set(runs.by_replica[place.data]) if place.pipeline == 0 else set()
        assert {number for other, number in got if other == rank} == wanted
    for move in moves.moves:
        source = student.place(move.source)
        assert source.data == move.microbatch % student.data, "the source's replica has read this microbatch"
        assert source.context == teacher.place(move.destination).context, "and this part of its sequences"
        if student.place(move.destination)[1:3] == source[1:3]:
            assert move.is_local, "what a rank has read itself, nobody sends to it"


def carried_out(moves: Moves, student: Grid, teacher: Grid, count: int, stages: tuple[int, int], split: bool) -> dict:
    """(destination, microbatch) -> where each piece of it came from, in units: (part of the sequence, unit)."""
    runs = assign(student, teacher, count)
    results: dict[tuple[int, int], dict[int, tuple[int, int]]] = {}
    for move in moves.moves:
        place = teacher.place(move.source)
        length = moves.units // (teacher.tensor if split else 1)
        held = [(place.context, (length * place.tensor if split else 0) + unit) for unit in range(length)]
        assert place.pipeline == stages[0]
        assert move.microbatch in runs.by_replica[place.data][: runs.counted[place.data]]
        assert move.start < move.stop
        target = results.setdefault((move.destination, move.microbatch), {})
        for unit in range(move.start, move.stop):
            assert unit - move.wanted not in target, "a piece arrives once"
            assert 0 <= unit - move.held < length
            target[unit - move.wanted] = held[unit - move.held]
    return results


@settings(max_examples=200, deadline=None)
@given(cases(), st.data())
def test_states_reach_every_rank_that_needs_them(case: tuple[Grid, Grid, int], data: st.DataObject) -> None:
    student, teacher, count = case
    stages = data.draw(st.integers(0, teacher.pipeline - 1)), data.draw(st.integers(0, student.pipeline - 1))
    # Hidden states follow sequence parallelism; an attention relation's channels are shared out at any TP.
    wide = data.draw(st.booleans())
    split = (teacher.sequence, student.sequence) if wide else (teacher.tensor > 1, student.tensor > 1)
    moves = state_moves(student, teacher, count, stages, split)
    got = carried_out(moves, student, teacher, count, stages, split[0])
    wanted = {
        (rank, k * student.data + student.place(rank).data)
        for rank in student.ranks()
        if student.place(rank).pipeline == stages[1]
        for k in range(count)
    }
    assert set(got) == wanted
    for (rank, _), pieces in got.items():
        place = student.place(rank)
        length = moves.units // (student.tensor if split[1] else 1)
        first = length * place.tensor if split[1] else 0
        assert pieces == {unit: (place.context, first + unit) for unit in range(length)}


@settings(max_examples=100, deadline=None)
@given(cases(), st.data())
def test_nothing_is_sent_that_is_there(case: tuple[Grid, Grid, int], data: st.DataObject) -> None:
    grid, other, count = case
    stage = data.draw(st.integers(0, grid.pipeline - 1))
    for split in (False, True):
        assert all(move.is_local for move in state_moves(grid, grid, count, (stage, stage), (split, split)).moves)
    assert all(move.is_local for move in token_moves(grid, grid, count).moves)
    assert assign(grid, grid, count).by_replica == tuple(
        tuple(k * grid.data + r for k in range(count)) + assign(grid, grid, count).by_replica[r][count:]
        for r in range(grid.data)
    ), "with equal layouts every replica runs its own, in order"
    for move in state_moves(other, grid, count, (stage, 0), (False, False)).moves:
        place = grid.place(move.destination)
        runs = assign(other, grid, count)
        ran = runs.by_replica[place.data][: runs.counted[place.data]]
        same_part = place.context == other.place(move.destination).context
        assert move.is_local == (place.pipeline == stage and same_part and move.microbatch in ran)


def test_sources_take_turns() -> None:
    """Student DP4, teacher TP4: each of four ranks that hold the same states sends to others as much as the rest."""
    student, teacher = Grid(1, 1, 4, 1), Grid(4, 1, 1, 1)
    sent = Counter(move.source for move in state_moves(student, teacher, 4, (0, 0), (False, False)).moves)
    assert set(sent.values()) == {4}
    # Student TP4 without, teacher TP4 with sequence parallelism: three quarters of it travel, all from their holders.
    gathered = state_moves(Grid(4, 1, 1, 1), Grid(4, 1, 1, 1, None, True), 1, (0, 0), (True, False))
    assert gathered.units == 4
    assert len([move for move in gathered.moves if not move.is_local]) == 12


def test_drawn_example() -> None:
    """The module's own picture: student TP2 x DP2, teacher TP1 x DP4, two microbatches a replica."""
    runs = assign(Grid(2, 1, 2, 1), Grid(1, 1, 4, 1), 2)
    assert runs.by_replica == ((0,), (2,), (1,), (3,))
    moves = state_moves(Grid(2, 1, 2, 1), Grid(1, 1, 4, 1), 2, (0, 0), (False, False)).moves
    assert [(m.source, m.destination, m.microbatch) for m in moves] == [
        *((0, 0, 0), (1, 0, 2)),
        *((0, 1, 0), (1, 1, 2)),
        *((2, 2, 1), (3, 2, 3)),
        *((2, 3, 1), (3, 3, 3)),
    ]


def test_units_divide_both_shards() -> None:
    moves = state_moves(Grid(2, 1, 3, 1, None, True), Grid(3, 1, 2, 1, None, True), 1, (0, 0), (True, True))
    assert moves.units == 6
    for rank in range(6):
        parts = [move for move in moves.moves if move.destination == rank]
        assert sum(Fraction(move.stop - move.start, moves.units) for move in parts) == Fraction(1, 2)


def test_stage_of_a_layer() -> None:
    assert [Grid(1, 1, 1, 2).stage_of(layer, 5) for layer in range(5)] == [0, 0, 0, 1, 1]
    assert [Grid(1, 1, 1, 2, 2).stage_of(layer, 4) for layer in range(4)] == [0, 1, 0, 1]
