"""Every family through the verbs, imported, pruned and exported: against transformers, and against the tensors of the
original folder cut by hand.

Tensors: bit for bit, since these verbs only move numbers. Logits: fp32, 1e-5 of the largest |logit|; the same products
summed in another order leave about 1e-6, a head in the wrong place or a wrong rotary frequency 1e-1.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from minitron_mcore.importance.scores import Scores, save_scores
from tests.distributed.hf_cases import (
    CASES,
    architecture_of,
    error,
    greedy_tokens,
    logits_of,
    save_with_transformers,
    tensors_of,
    token_ids,
    transformers_logits,
    transformers_tokens,
    whole_logits,
)
from tests.distributed.models import LAYOUTS, start_layout
from tests.distributed.ranks import run_on_ranks
from tests.e2e.verbs import all_run_well, minitron, run_well
from tests.unit.text_data import small_data, small_tokenizer

# Imported at the one, exported and loaded again at the other.
PLACES = {"1": "TP2", "TP2": "1", "PP2": "TP2-PP2", "TP2-PP2": "1"}
# Every size differs from the teacher's and from the others; hidden sizes are multiples of the heads, for Llama's sake.
WIDTH = {"hidden_size": 72, "ffn_hidden_size": 100, "num_attention_heads": 4}
BOTH = {"num_layers": 2, "hidden_size": 60, "ffn_hidden_size": 104, "num_attention_heads": 2}
# Kind of pruning: the student, the layout its teacher was imported at, the layout it is pruned at.
PRUNINGS: dict[str, tuple[dict[str, int], str, str]] = {
    "width": (WIDTH, "1", "TP2-PP2"),
    "depth": ({"num_layers": 2}, "TP2-PP2", "1"),
    "both": (BOTH, "PP2", "TP2"),
}
SCORED = "qwen3"  # the family whose scores `minitron score` makes; the others' are random
LENGTH = 32
NEW = 6  # tokens that are generated


def at(place: str) -> tuple[list[str], int]:
    """The recipe's words for a layout, and its number of ranks."""
    world_size, parallel = LAYOUTS[place]
    return [f"parallel.{key}={value}" for key, value in parallel.items()], world_size


def student_of(case: str, kind: str) -> dict[str, int]:
    """Where each group has one query head, none can go."""
    a, sizes = architecture_of(case), dict(PRUNINGS[kind][0])
    if a.heads_per_group == 1:
        sizes.pop("num_attention_heads", None)
    return sizes


def random_scores(case: str, path: Path) -> None:
    a = architecture_of(case)
    draw = numpy.random.default_rng(sum(case.encode()))
    shapes = {
        "hidden": (a.hidden_size,),
        "ffn": (a.num_layers, a.ffn_hidden_size),
        "heads": (a.num_layers, a.num_attention_heads),
        "layers": (a.num_layers,),
    }
    arrays: dict[str, Any] = {axis: draw.random(shape) for axis, shape in shapes.items()}
    save_scores(Scores(a, **arrays), path)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`theirs-CASE`: models made and saved by transformers in several files, each with a tokenizer."""
    root = tmp_path_factory.mktemp("families")
    small_tokenizer(root / "tokenizer.model")
    for case in CASES:
        save_with_transformers(case, root / f"theirs-{case}")
        shutil.copy(root / "tokenizer.model", root / f"theirs-{case}")
    return root


@pytest.fixture(scope="module")
def imported(root: Path) -> Path:
    """`imported-CASE-PLACE`, by the verb."""
    for place in PLACES:
        words, world_size = at(place)
        commands = [
            ["import", f"hf={root / f'theirs-{case}'}", f"checkpoint={root / f'imported-{case}-{place}'}", *words]
            for case in CASES
        ]
        all_run_well(commands, world_size)
    return root


def kept(case: str) -> list[str]:
    """transformers reads the tokenizer of any Qwen2 folder by a class of its own, hence a converted SentencePiece model
    otherwise, and the export is refused: there the model goes along as it is."""
    return ["allow=[unconverted_tokenizer]"] if case.startswith("qwen2") else []


@pytest.fixture(scope="module")
def exported(imported: Path) -> Path:
    """`exported-CASE-PLACE`, each at another layout than it was imported at."""
    for place, other in PLACES.items():
        words, world_size = at(other)
        commands = [
            [
                "export",
                f"checkpoint={imported / f'imported-{case}-{place}'}",
                f"hf={imported / f'exported-{case}-{place}'}",
                "max_shard_size=300KB",
                *kept(case),
                *words,
            ]
            for case in CASES
        ]
        all_run_well(commands, world_size)
    return imported


def logits_on_rank(folders: list[str], parallel: dict[str, Any], world_size: int) -> tuple[dict[str, Any], ...]:
    """Of iteration 0 of each checkpoint: our logits [s, b, V / TP], on the last stage, and what follows the prompts."""
    from minitron_mcore.checkpoint.folder import read_architecture
    from minitron_mcore.checkpoint.store import as_chunks, load_weights
    from minitron_mcore.model.gpt import build_model

    layout = start_layout(parallel, world_size)
    logits, written = {}, {}
    for folder in folders:
        architecture = read_architecture(Path(folder))
        chunks = build_model(architecture, layout, "fp32", trainable=False)
        load_weights(Path(folder), 0, as_chunks(chunks), architecture)
        logits[Path(folder).name] = logits_of(chunks)
        written[Path(folder).name] = greedy_tokens(chunks, architecture, prompts(), NEW)
    return logits, written


def prompts() -> list[list[int]]:
    """Of unequal length."""
    return [row[: 7 + 5 * number].tolist() for number, row in enumerate(token_ids())]


def our_logits(folders: list[Path], place: str) -> tuple[dict[str, torch.Tensor], dict[str, list[list[int]]]]:
    """Logits [b, s, V], and the tokens that follow the prompts, by the folder's name."""
    world_size, parallel = LAYOUTS[place]
    ranks = run_on_ranks(logits_on_rank, world_size, [str(folder) for folder in folders], parallel, world_size)
    logits, written = zip(*ranks, strict=True)
    return whole_logits(list(logits), parallel.get("tensor", 1)), written[0]


@pytest.fixture(scope="module")
def imported_logits(imported: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for place, other in PLACES.items():
        found |= our_logits([imported / f"imported-{case}-{place}" for case in CASES], other)[0]
    return found


@pytest.mark.parametrize("case", CASES)
def test_imported_at_one_layout_and_run_at_another(root: Path, imported_logits: dict[str, Any], case: str) -> None:
    expected = transformers_logits(root / f"theirs-{case}")
    for place in PLACES:
        assert error(imported_logits[f"imported-{case}-{place}"], expected) <= 1e-5, place


@pytest.mark.parametrize("case", CASES)
def test_exported_again_is_what_was_imported(exported: Path, case: str) -> None:
    """Every tensor bit for bit, in several files with an index; and transformers reads the same config."""
    original, config = tensors_of(exported / f"theirs-{case}"), config_of(exported / f"theirs-{case}")
    for place in PLACES:
        folder = exported / f"exported-{case}-{place}"
        again = tensors_of(folder)
        assert again.keys() == original.keys(), place
        assert not [key for key in original if not torch.equal(again[key], original[key])], place
        assert config_of(folder) == config, place
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        assert index.keys() == original.keys() and len(set(index.values())) > 3


def config_of(folder: Path) -> dict[str, Any]:
    """As transformers reads it, but for who wrote it."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder).to_dict()
    return {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}


@pytest.fixture(scope="module")
def pruned(imported: Path) -> Path:
    """`student-CASE-KIND`, cut by the verb from an imported checkpoint, and `pruned-CASE-KIND`, its export."""
    for case in CASES:
        if case == SCORED:
            score(imported, case, imported / f"{case}.safetensors")
        else:
            random_scores(case, imported / f"{case}.safetensors")
    for kind, (_, teacher, place) in PRUNINGS.items():
        words, world_size = at(place)
        commands = [
            [
                "prune",
                f"teacher.checkpoint={imported / f'imported-{case}-{teacher}'}",
                f"scores={imported / f'{case}.safetensors'}",
                f"student.checkpoint={imported / f'student-{case}-{kind}'}",
                *(f"student.{name}={size}" for name, size in student_of(case, kind).items()),
                *words,
            ]
            for case in CASES
        ]
        all_run_well(commands, world_size)
    names = [f"{case}-{kind}" for case in CASES for kind in PRUNINGS]
    all_run_well(
        [
            ["export", f"checkpoint={imported / f'student-{n}'}", f"hf={imported / f'pruned-{n}'}", *kept(n)]
            for n in names
        ]
    )
    return imported


def score(root: Path, case: str, path: Path) -> None:
    from minitron_mcore.data.tokenizer import load_tokenizer

    data = small_data(root / "tokens", load_tokenizer(str(root / "tokenizer.model")))
    words, world_size = at("TP2")
    settings = [
        f"data.train={data}",
        f"data.sequence_length={LENGTH}",
        "data.num_workers=0",
        "importance.num_samples=4",
    ]
    teacher = f"teacher.checkpoint={root / f'imported-{case}-TP2'}"
    run_well("score", teacher, f"scores={path}", *settings, *words, world_size=world_size)


def cut_by_hand(original: dict[str, torch.Tensor], plan: dict[str, Any], head_dim: int) -> dict[str, torch.Tensor]:
    """The student's Hugging Face tensors: those of the teacher, indexed by what the plan keeps, name by name."""
    hidden, student = plan["hidden"], {}
    for name, tensor in original.items():
        if not name.startswith("model.layers."):
            # [V, h] of the embedding and the output head, or [h] of the last norm
            student[name] = tensor[..., hidden]
            continue
        number, part = name.removeprefix("model.layers.").split(".", 1)
        if int(number) not in plan["layers"]:
            continue
        ffn, heads = plan["ffn"][number], plan["heads"][number]
        if part.startswith("self_attn.q_proj"):
            by_head = tensor.unflatten(0, (-1, head_dim))[heads]
            tensor = (by_head[..., hidden] if part.endswith("weight") else by_head).flatten(0, 1)
        elif part.startswith(("self_attn.k_proj", "self_attn.v_proj")):
            tensor = tensor[:, hidden] if part.endswith("weight") else tensor
        elif part.startswith("self_attn.o_proj"):
            tensor = tensor[hidden].unflatten(1, (-1, head_dim))[:, heads].flatten(1, 2)
        elif part.startswith(("mlp.gate_proj", "mlp.up_proj")):
            tensor = tensor[ffn][:, hidden]
        elif part.startswith("mlp.down_proj"):
            tensor = tensor[hidden][:, ffn]
        elif part.startswith(("input_layernorm", "post_attention_layernorm")):
            tensor = tensor[hidden]
        else:
            assert part.startswith(("self_attn.q_norm", "self_attn.k_norm")), part  # over a head's channels, which stay
        student[f"model.layers.{plan['layers'].index(int(number))}.{part}"] = tensor
    return student


@pytest.mark.parametrize("kind", PRUNINGS)
@pytest.mark.parametrize("case", CASES)
def test_pruned_tensors_are_the_original_ones_cut_by_hand(pruned: Path, case: str, kind: str) -> None:
    original, a = tensors_of(pruned / f"theirs-{case}"), architecture_of(case)
    plan = json.loads((pruned / f"student-{case}-{kind}" / "plan.json").read_text())
    expected = cut_by_hand(original, plan, a.kv_channels)
    found = tensors_of(pruned / f"pruned-{case}-{kind}")
    assert found.keys() == expected.keys()
    assert not [key for key in expected if not torch.equal(found[key], expected[key])]

    sizes, config = student_of(case, kind), json.loads((pruned / f"pruned-{case}-{kind}" / "config.json").read_text())
    keys = {"num_layers": "num_hidden_layers", "ffn_hidden_size": "intermediate_size"}
    assert all(config[keys.get(name, name)] == size for name, size in sizes.items())
    assert config["head_dim"] == a.kv_channels == 20
    assert len(plan["hidden"]) == sizes.get("hidden_size", 96) and len(plan["layers"]) == sizes.get("num_layers", 3)


@pytest.fixture(scope="module")
def pruned_logits(pruned: Path) -> tuple[dict[str, torch.Tensor], dict[str, list[list[int]]]]:
    students = [pruned / f"student-{case}-{kind}" for case in CASES for kind in PRUNINGS]
    return our_logits(students, "PP2")


@pytest.mark.parametrize("kind", PRUNINGS)
@pytest.mark.parametrize("case", CASES)
def test_pruned_logits_are_those_of_transformers(
    pruned: Path, pruned_logits: tuple[dict[str, torch.Tensor], ...], case: str, kind: str
) -> None:
    ours, theirs = pruned_logits[0][f"student-{case}-{kind}"], transformers_logits(pruned / f"pruned-{case}-{kind}")
    assert error(ours, theirs) <= 1e-5
    unpruned = transformers_logits(pruned / f"theirs-{case}")
    assert error(ours, unpruned) > 1e-2, "nothing was cut"


@pytest.mark.parametrize("kind", PRUNINGS)
@pytest.mark.parametrize("case", CASES)
def test_pruned_students_write_what_transformers_writes(
    pruned: Path, pruned_logits: tuple[Any, dict[str, list[list[int]]]], case: str, kind: str
) -> None:
    """Greedy tokens, which are equal: margins of random models are far above rounding."""
    theirs = transformers_tokens(pruned / f"pruned-{case}-{kind}", prompts(), NEW)
    assert pruned_logits[1][f"student-{case}-{kind}"] == theirs


def test_inspect_says_what_a_pruned_export_is(pruned: Path) -> None:
    folder = pruned / "pruned-nemotron-both"
    found = json.loads(run_well("inspect", f"path={folder}", "json=true"))
    assert (found["kind"], found["architecture"]["family"]) == ("hugging_face", "nemotron")
    assert found["parameters"] == sum(tensor.numel() for tensor in tensors_of(folder).values())
    shape = {name: found["architecture"][name] for name in (*BOTH, "kv_channels", "vocab_size")}
    assert shape == {**BOTH, "kv_channels": 20, "vocab_size": 1003}


# 80 channels on 6 heads: every head keeps its 20 channels, but 80 is not a multiple of 6.
ODD = ["student.hidden_size=80"]


def odd_names(root: Path, case: str) -> list[str]:
    teacher = root / f"imported-{case}-1"
    return [f"teacher.checkpoint={teacher}", f"scores={root / f'{case}.safetensors'}", *ODD]


def test_a_shape_that_transformers_refuses(pruned: Path, tmp_path: Path) -> None:
    """Llama's config wants the hidden size to be a multiple of the heads: a warning at first, then no export."""
    words = "is not a multiple of num_attention_heads=6"
    names = odd_names(pruned, "llama-scaled")
    for shown in (
        run_well("plan", *names, f"plan={tmp_path / 'plan.json'}"),
        run_well("prune", *names, f"student.checkpoint={tmp_path / 'student'}"),
    ):
        (warning,) = [line for line in shown.splitlines() if line.startswith("WARNING: ") and words in line]
        assert "transformers" in warning
    before = sorted(tmp_path.rglob("*"))
    for place in ("1", "TP2"):
        layout, world_size = at(place)
        names = [f"checkpoint={tmp_path / 'student'}", f"hf={tmp_path / 'hf'}"]
        code, shown = minitron("export", *names, *layout, world_size=world_size)
        (sentence,) = [line for line in shown.splitlines() if line.startswith("minitron export: ")]
        assert code == 2 and words in sentence and "student.hidden_size" in sentence and "Traceback" not in shown
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("case", ["nemotron", "mistral", "qwen2", "qwen3"])
def test_the_same_shape_in_other_families(pruned: Path, tmp_path: Path, case: str) -> None:
    """transformers has no such rule there: no warning, and the export loads."""
    shown = run_well("prune", *odd_names(pruned, case), f"student.checkpoint={tmp_path / 'student'}")
    assert "no multiple" not in shown
    run_well("export", f"checkpoint={tmp_path / 'student'}", f"hf={tmp_path / 'hf'}", *kept(case))
    ours, written = our_logits([tmp_path / "student"], "1")
    assert error(ours["student"], transformers_logits(tmp_path / "hf")) <= 1e-5
    assert written["student"] == transformers_tokens(tmp_path / "hf", prompts(), NEW)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_as_it_is(root: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    save_with_transformers("qwen2-tied", tmp_path / "theirs", dtype)
    shutil.copy(root / "tokenizer.model", tmp_path / "theirs")
    names = f"checkpoint={tmp_path / 'checkpoint'}"
    words, world_size = at("TP2")
    run_well("import", f"hf={tmp_path / 'theirs'}", names, *words, world_size=world_size)
    run_well("export", f"hf={tmp_path / 'again'}", names, *kept("qwen2-tied"))
    original, again = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "again")
    assert {tensor.dtype for tensor in again.values()} == {dtype} and again.keys() == original.keys()
    # torch.equal would take -0 for 0
    assert all(torch.equal(again[key].view(torch.int16), original[key].view(torch.int16)) for key in original)
    assert config_of(tmp_path / "again") == config_of(tmp_path / "theirs")
