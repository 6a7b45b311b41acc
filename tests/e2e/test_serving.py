"""Exported students in engines that serve them (benchmarks/serving.py), as far as they are installed; docs/serving.md
has what each of them made of all families.

Greedy, fp32: the same tokens. What is warned of is refused, and nothing else is.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from minitron_mcore.architecture import build_architecture
from minitron_mcore.bench.engines import EngineError
from minitron_mcore.families.serving_limits import serving_warnings
from tests.distributed.ranks import run_on_ranks

serving: Any = importlib.import_module("benchmarks.serving")

# As the table of limits calls them.
CALLED = {"llama.cpp": "llama.cpp", "vllm": "vLLM", "ctranslate2": "CTranslate2", "onnxruntime-genai": "ONNX Runtime"}


def students_on_rank(root: Path) -> tuple[dict[str, tuple[Path, Path]], dict[str, list[list[int]]]]:
    """The students, and what this project makes of them."""
    students = serving.make_students(root)
    return students, {name: serving.our_tokens(checkpoint) for name, (checkpoint, _) in students.items()}


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[list[int]]]]:
    """Exported folders, and the tokens that transformers and this project make of them."""
    (made, ours), found = run_on_ranks(students_on_rank, 1, tmp_path_factory.mktemp("students"))[0], {}
    place = tmp_path_factory.mktemp("transformers")
    for name, (_, exported) in made.items():
        _, tokens = serving.engine_tokens("transformers", exported, serving.FOLDER, place)
        assert ours[name] == tokens, name
        found[name] = exported, tokens
    return found


@pytest.mark.slow
@pytest.mark.parametrize("engine", serving.PACKAGES)
@pytest.mark.timeout(1800)
def test_an_engine_makes_the_same_tokens(
    students: dict[str, tuple[Path, list[list[int]]]], tmp_path: Path, engine: str
) -> None:
    if engine not in serving.installed(serving.FOLDER):
        pytest.skip(f"{engine} is not installed: python -m benchmarks.serving install {engine}")
    for name, (exported, expected) in students.items():
        family, kind = name.split("-")
        shape = build_architecture({**serving.TEACHER, "family": family, **serving.STUDENTS[kind]})
        warned = [said for said in serving_warnings(shape) if said.startswith(f"{CALLED[engine]} will not load")]
        try:
            _, made = serving.engine_tokens(engine, exported, serving.FOLDER, tmp_path)
        except EngineError as error:
            # It has no loader for the one, and stops at the tokenizer of the other (docs/serving.md).
            assert warned or (engine == "ctranslate2" and family in ("nemotron", "qwen2")), f"{name}: {error}"
        else:
            assert not warned, name
            assert all(map(serving.agree, made, expected)), name
