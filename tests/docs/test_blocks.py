"""Code in the documents: YAML is read as recipes, Python is compiled and its names are looked up.

The examples of docs/api.md run in tests/distributed/test_api.py, those of RUN here.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
from pathlib import Path

import pytest
import yaml

from minitron_mcore.recipe import load_recipe
from tests.distributed.ranks import run_on_ranks
from tests.docs.documents import ROOT, Block, blocks

BLOCKS = list(blocks())
# Documents whose Python needs nothing but itself: all its blocks run one after another.
RUN = ("docs/how-to/your-metric.md",)
# YAML that is no recipe: how it begins.
NO_RECIPE: tuple[str, ...] = ()


def of(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_yaml_is_a_recipe(block: Block, tmp_path: Path) -> None:
    if block.text.startswith(NO_RECIPE):
        yaml.safe_load(block.text)
        return
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(block.text)
    load_recipe(str(recipe), [])


@pytest.mark.parametrize("block", of("json"), ids=str)
def test_json_is_json(block: Block) -> None:
    """One value, or one a line."""
    try:
        json.loads(block.text)
    except ValueError:
        for line in block.text.splitlines():
            json.loads(line)


def test_python_compiles_and_imports_what_is_there() -> None:
    """In a worker, which has imported the heavy part already."""
    assert run_on_ranks(missing, 1)[0] == []


def missing() -> list[str]:
    """What the blocks name and the package does not have."""
    found = []
    for block in of("python"):
        stands_for = "minitron_mcore.api"  # what `minitron` is; a block before may have imported it
        for node in ast.walk(ast.parse(block.text)):
            names: list[str] = []
            module = stands_for
            if isinstance(node, ast.Import):
                stands_for = next((name.name for name in node.names if name.asname == "minitron"), stands_for)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minitron_mcore"):
                module, names = str(node.module), [name.name for name in node.names]
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "minitron":
                names = [node.attr]
            found += [
                f"{block}: {module}.{name}" for name in names if not hasattr(importlib.import_module(module), name)
            ]
    return found


def execute(folder: Path, document: str) -> None:
    """Runs in a worker."""
    names: dict[str, object] = {}
    home = os.getcwd()
    os.chdir(folder)
    try:
        for block in of("python"):
            if block.document == document:
                exec(compile(block.text, str(block), "exec"), names)
    finally:
        os.chdir(home)


@pytest.mark.parametrize("document", RUN)
def test_python_runs(document: str, tmp_path: Path) -> None:
    if not (ROOT / document).exists():
        pytest.skip(f"no {document}")
    run_on_ranks(execute, 1, tmp_path, document)


def test_every_language_is_known() -> None:
    """So that no block is left out by a misspelt one."""
    known = {"", "bash", "console", "json", "math", "python", "text", "yaml"}
    assert {block.language for block in BLOCKS if not block.language.startswith("{")} <= known
