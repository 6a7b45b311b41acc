"""Segments packed into rows: losses, gradients, states and logits are those of each segment by itself.

Against formulas in float64 and against transformers, one segment at a time, and against rows of one segment each.
Everything is in fp32: the same numbers summed in another order leave 1e-7 in a loss and up to 1e-6 in a gradient by
relative Frobenius norm, of 1e-5 asked for; a segment that sees another, or whose positions run on, leaves 0.01 or more.
"""

from __future__ import annotations

import time
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from minitron_mcore.model.recompute import KEEP_ALL, Recompute
from tests.distributed.dense_reference import DenseModel, fill
from tests.distributed.hf_cases import save_with_transformers
from tests.distributed.models import LAYOUTS, SEQUENCE, assemble, my_batch, relative_error, start_layout, steady
from tests.distributed.packed_rows import COUNT, LENGTHS, alone, by_segment, drawn, packed
from tests.distributed.ranks import run_on_ranks
from tests.distributed.state_loss_problem import CASES, build, dense_solution, solve_on_rank, weights_of

# Everything at once: a teacher, the loss between logits and those between states, grouped queries.
TOGETHER = "all-mse"
VOCABULARY = CASES[TOGETHER].student.vocab_size
# name -> (layout, micro-batch, what backward computes again, cases)
RUNS: dict[str, tuple[str, int, Recompute, tuple[str, ...]]] = {
    **{f"{layout}, micro-batch {size}": (layout, size, KEEP_ALL, (TOGETHER,)) for layout in LAYOUTS for size in (1, 4)},
    "other losses and families": ("TP2-SP", 2, KEEP_ALL, ("all-dynamic", "all-nemotron")),
    "recomputed": ("1", 4, Recompute("full", "uniform", 2), (TOGETHER,)),
    "recomputed, PP2-VPP2": ("PP2-VPP2", 4, Recompute("full"), (TOGETHER,)),
    "recomputed in part, TP2-SP": ("TP2-SP", 1, Recompute("full", "block", 3), (TOGETHER,)),
}
# What `make test` runs: both sizes on one rank and through both schedules, and one of every split.
QUICK = {
    *(
        "1, micro-batch 1",
        "1, micro-batch 4",
        "PP2-VPP2, micro-batch 1",
        "DP2, micro-batch 4",
        "TP2-PP2, micro-batch 4",
    ),
    *("other losses and families", "recomputed, PP2-VPP2", "recomputed in part, TP2-SP"),
}


def solve_all_on_rank(names: list[str], world_size: int) -> dict[str, dict[str, Any]]:
    """The named runs, one layout after another in the same ranks."""
    found = {}
    for name in names:
        layout, size, recompute, cases = RUNS[name]
        how: Any = {"recompute": recompute, "parts": packed(VOCABULARY, size)}
        found[name] = solve_on_rank(list(cases), LAYOUTS[layout][1], world_size, **how)
    return found


@cache
def solved_together(world_size: int, quick: bool) -> dict[str, list[dict[str, Any]]]:
    """What each rank found, by run."""
    names = [
        name for name, (layout, *_) in RUNS.items() if LAYOUTS[layout][0] == world_size and quick == (name in QUICK)
    ]
    ranks = run_on_ranks(solve_all_on_rank, world_size, names, world_size)
    return {name: [rank[name] for rank in ranks] for name in names}


def solved(name: str) -> list[dict[str, Any]]:
    return solved_together(LAYOUTS[RUNS[name][0]][0], name in QUICK)[name]


@cache
def dense(case: str) -> dict[str, Any]:
    run = "1, micro-batch 4" if case == TOGETHER else "other losses and families"
    projection = solved(run)[0][case]["projection"]
    return dense_solution(CASES[case], projection, drawn(VOCABULARY, seed=3))


def assert_as_alone(ranks: list[dict[str, Any]], case: str) -> None:
    """Every loss, gradient and the norm of what ranks found: those of the segments, one by one, in float64."""
    expected, architecture = dense(case), CASES[case].student
    for rank in ranks:
        for metric, value in expected["means"].items():
            assert value > 0.01, f"{metric} is too small to compare"
            assert rank[case]["means"][metric] == pytest.approx(value, rel=1e-5), metric
        assert rank[case]["norm"] == pytest.approx(expected["norm"], rel=1e-5)
        if expected["projection_gradient"] is not None:
            assert relative_error(rank[case]["projection_gradient"], expected["projection_gradient"]) <= 1e-5
    for key, gradient in assemble([rank[case]["gradients"] for rank in ranks], architecture).items():
        assert relative_error(gradient, expected["gradients"][key]) <= 1e-5, key


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_losses_and_gradients_against_float64(name: str) -> None:
    for case in RUNS[name][-1]:
        assert_as_alone(solved(name), case)


def test_rows_of_one_segment_each_are_no_different() -> None:
    """Unpacked, padded at the right: the path that has been there before. They are 20 rows instead of 8."""
    parts = alone(VOCABULARY, 2)
    assert len(parts) * 2 == COUNT
    assert_as_alone(run_on_ranks(solve_on_rank, 1, [TOGETHER], {}, 1, parts=parts), TOGETHER)


def test_on_the_stand_in_of_a_gpu() -> None:
    """The boundaries are on the device where they are read."""
    parts = packed(VOCABULARY, 4)
    ranks = run_on_ranks(solve_on_rank, 1, [TOGETHER], {}, 1, parts=parts, device="stand-in")
    assert_as_alone(ranks, TOGETHER)


def token_losses_on_rank(layouts: list[str], world_size: int) -> list[dict[int, torch.Tensor]]:
    """Each token's loss by segment, of packed rows at each layout; then, on one rank, of rows of one segment."""
    from minitron_mcore.distillation.logits.loss import logit_loss
    from minitron_mcore.distillation.logits.settings import LossSettings
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.schedule import forward_only
    from minitron_mcore.runtime.groups import tensor_group

    architecture, settings = CASES[TOGETHER].student, LossSettings(vocab_size=VOCABULARY)

    def visit(chunk: Any, hidden_SBH: torch.Tensor, microbatch: Any) -> Any:
        if not chunk.post_process:
            return None
        given = hidden_SBH, chunk.head_weight(), microbatch.labels.T, microbatch.loss_mask.T, settings
        how: Any = {"tp_group": tensor_group(), "sequence_parallel": chunk.config.sequence_parallel}
        return logit_loss(*given, **how).token_loss.T, microbatch.segments

    found = []
    for layout in layouts:
        parallel = start_layout(LAYOUTS[layout][1], world_size)
        chunks: list[Any] = build_model(architecture, parallel, "fp32", trainable=False)
        fill(chunks, architecture, weights_of(CASES[TOGETHER], False))
        for parts in (packed(VOCABULARY, 4), *([alone(VOCABULARY, 2)] if layout == "1" else [])):
            visited = [pair for pair in forward_only(chunks, my_batch(parts), visit) if pair is not None]
            found.append({number: loss for pair in visited for number, loss in by_segment(*pair).items()})
    return found


def test_each_tokens_loss() -> None:
    """Of all segments, at every layout, against float64 and against rows of one segment each."""
    model = DenseModel(CASES[TOGETHER].student, weights_of(CASES[TOGETHER], False))
    expected = []
    for part in drawn(VOCABULARY, seed=3):
        logits = model.forward(part["tokens"])["logits"][0, :, :VOCABULARY]
        expected.append(torch.nn.functional.cross_entropy(logits, part["labels"][0], reduction="none"))
    for world_size in (1, 2, 4):
        layouts = [name for name, (size, _) in LAYOUTS.items() if size == world_size]
        ranks = run_on_ranks(token_losses_on_rank, world_size, layouts, world_size)
        for of_layout in zip(*ranks, strict=True):
            seen: dict[int, torch.Tensor] = {}
            for rank in of_layout:
                seen |= rank
            assert sorted(seen) == list(range(COUNT))
            for number, losses in seen.items():
                torch.testing.assert_close(losses.double(), expected[number], rtol=1e-5, atol=1e-5)


STEPS, ROWS = 6, 8


def chats() -> Any:
    """As many chats as there are segments, of random tokens, of which all but the first third are learnt."""
    from minitron_mcore.data.chat.prepared import Part

    sizes = [length + 1 for row in LENGTHS for length in row]  # the last token is a label alone
    tokens = torch.randint(0, VOCABULARY, (sum(sizes),), generator=torch.Generator().manual_seed(4))
    learnt = [place >= size // 3 for size in sizes for place in range(size)]
    starts = numpy.cumsum([0, *sizes])
    return Part(tokens.int().numpy(), numpy.array(learnt), starts, None, sides=1)


def distil_on_rank(parallel: dict[str, Any], world_size: int) -> list[dict[str, float]]:
    """What each step on packed chats reports: the teacher resident, all losses."""
    from minitron_mcore.data.chat.dataset import ChatDataset
    from minitron_mcore.data.dataset import batches
    from minitron_mcore.model.microbatch import to_device
    from minitron_mcore.runtime.groups import data_place
    from minitron_mcore.training.config import TrainConfig
    from minitron_mcore.training.step import Trained, build_optimizer, build_scheduler, train_step, wrap_model

    models, objective = build(CASES[TOGETHER], start_layout(parallel, world_size))
    sizes: Any = {"global_batch_size": ROWS, "micro_batch_size": ROWS // 2}
    train = TrainConfig(lr=3e-3, min_lr=1e-3, lr_warmup_iters=1, **sizes)
    chunks, timetable = wrap_model(models), steady(train, STEPS)
    optimizer = build_optimizer(chunks, train, "fp32")
    trained = Trained(chunks, optimizer, build_scheduler(optimizer, train, timetable))
    data = ChatDataset(chats(), SEQUENCE, padding=0, seed=1, size=ROWS * STEPS, packing=True)
    stream, history = batches(data, consumed_samples=0, **sizes, **data_place()), []
    for step in range(STEPS):
        batch = [to_device(next(stream)) for _ in range(2)]
        assert all(microbatch.packed is not None for microbatch in batch), "rows of several chats"
        history.append(train_step(trained, objective, timetable.at(step).shape, batch))
    return history


def test_distillation_on_packed_chats_trains() -> None:
    """Over two stages as on one rank: the losses to 1e-5, as everywhere, and they fall."""
    (single,) = run_on_ranks(distil_on_rank, 1, {}, 1)
    for rank in run_on_ranks(distil_on_rank, 2, {"pipeline": 2}, 2):
        for ours, theirs in zip(rank, single, strict=True):
            for name in ("lm loss", "logits distillation loss", "block output loss", "attention relation loss"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
            assert ours["grad-norm"] == pytest.approx(theirs["grad-norm"], rel=1e-3)
        for name in ("logits distillation loss", "block output loss"):
            assert rank[-1][name] < 0.9 * rank[0][name], name


FAMILIES = ("llama-scaled", "nemotron", "qwen3")  # scaled frequencies, part of a head rotated, normed queries and keys


def imported_logits_on_rank(folder: str) -> dict[str, dict[int, torch.Tensor]]:
    """Logits [length, V] by segment, of packed rows, by imported model."""
    from minitron_mcore.checkpoint.folder import write_description
    from minitron_mcore.checkpoint.hf_config import read_config
    from minitron_mcore.checkpoint.import_hf import import_checkpoint
    from minitron_mcore.checkpoint.store import as_chunks, load_weights
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.schedule import forward_only
    from minitron_mcore.runtime.start import start

    layout, found = start_layout({}, 1), {}
    for case in FAMILIES:
        theirs, ours = Path(folder, case), Path(folder, f"{case}-imported")
        architecture = read_config(theirs)
        import_checkpoint(theirs, ours, architecture, layout, start())
        write_description(ours, architecture, lineage={}, recipe="", save_tokenizer=None)
        chunks = build_model(architecture, layout, "fp32", trainable=False)
        load_weights(ours, 0, as_chunks(chunks), architecture)

        def visit(chunk: Any, hidden_S1H: torch.Tensor, microbatch: Any) -> Any:
            return chunk.logits(hidden_S1H).squeeze(1), microbatch.segments[0]

        visited = forward_only(as_chunks(chunks), my_batch(packed(VOCABULARY, 4)), visit)
        found[case] = {
            number: logits[segments == number, :VOCABULARY]
            for logits, segments in visited
            for number in segments.unique().tolist()
            if number >= 0
        }
    return found


def test_logits_against_transformers(tmp_path: Path) -> None:
    """Of each segment alone, to 1e-5 of the largest logit."""
    from transformers import AutoModelForCausalLM

    for case in FAMILIES:
        save_with_transformers(case, tmp_path / case)
    for case, of_segments in run_on_ranks(imported_logits_on_rank, 1, str(tmp_path))[0].items():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / case, dtype=torch.float32).eval()
        assert sorted(of_segments) == list(range(COUNT))
        for number, part in enumerate(drawn(VOCABULARY, seed=3)):
            with torch.no_grad():
                expected = model(part["tokens"]).logits[0]
            assert float((of_segments[number] - expected).abs().max() / expected.abs().max()) <= 1e-5, (case, number)


def attention_seconds_on_rank(tokens: int, segments: list[list[int]]) -> list[float]:
    """The least processor time of forward and backward over a row of so many tokens: whole, and cut into segments of
    these lengths."""
    from megatron.core.transformer.enums import AttnMaskType

    from minitron_mcore.model.gpt import transformer_config
    from minitron_mcore.model.packing import Packed
    from minitron_mcore.model.schedule import sequence_params
    from minitron_mcore.model.specs import SDPACoreAttention

    config = transformer_config(CASES[TOGETHER].student, start_layout({}, 1), "fp32")
    attention: Any = SDPACoreAttention(config, attn_mask_type=AttnMaskType.causal)
    query, key, value = (torch.randn(tokens, heads, 64).requires_grad_() for heads in (8, 2, 2))

    def seconds(attend: Any) -> float:
        started = time.process_time()
        attend().sum().backward()
        return time.process_time() - started

    rows = [partial(attention, *(part.unsqueeze(1) for part in (query, key, value)), None)]
    for lengths in segments:
        assert sum(lengths) == tokens, lengths
        numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).unsqueeze(0)
        params = sequence_params(Packed.of(numbers))
        rows.append(partial(attention, query, key, value, None, packed_seq_params=params))
    return [min(seconds(attend) for _ in range(5)) for attend in rows]


def test_attention_by_segment_is_no_slower() -> None:
    """Than one causal row of as many tokens: of few segments as of many, and of one it is the same work (a third is
    left to other processes in the caches)."""
    tokens = 512
    lengths = [[tokens // count] * count for count in (1, 4, 16, 32)]
    row, one, *others = run_on_ranks(attention_seconds_on_rank, 1, tokens, lengths)[0]
    assert one <= 4 / 3 * row
    assert max(others) <= row, (row, others)
