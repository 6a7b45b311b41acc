"""Imports point down only. The table is the order of the house; a module without a level fails the test.

A module whose docstring says "Pure." imports neither megatron nor torch.distributed, nor a module that does.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "minitron_mcore"

# From the ground up. A room sees the rooms on lower floors and itself, never its neighbours, but on the ground floor.
# Seen by all is every `config.py`: a section of the recipe beside what it configures.
FLOORS = [
    {"errors", "files", "keys", "megatron_names", "reading", "tables", "architecture", "layout", "families"},
    {"runtime"},
    {"model"},
    {"checkpoint", "data"},
    {"inference"},
    {"evaluation", "bench"},
    {"importance", "pruning", "distillation"},
    {"alignment"},
    {"training"},
    {"recipe"},
    {"estimate"},
    {"search", "report", "reproduction"},
    {"jobs"},
    {"stages"},
    {"verbs"},
    {"commands", "shell"},
    {"in_memory"},
    {"api", "cli"},
    {"__main__"},
]
FORBIDDEN_IN_PURE = ("megatron", "torch.distributed")


def module_name(path: Path) -> str:
    parts = ["minitron_mcore", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room(module: str) -> str:
    """`minitron_mcore.runtime.start` → `runtime`."""
    return [*module.split("."), ""][1]


def floor(module: str) -> int:
    if is_config(module):
        return 0
    floors = [number for number, rooms in enumerate(FLOORS) if room(module) in rooms]
    assert floors, f"{module} has no level: give {room(module)!r} one in FLOORS (and in CONTRIBUTING.md)"
    return floors[0]


def is_config(module: str) -> bool:
    return module.endswith(".config")


def says_pure(module: str) -> bool:
    return (
        re.search(r"\bPure\.", ast.get_docstring(ast.parse(MODULES[module].read_text(encoding="utf-8"))) or "")
        is not None
    )


def impure() -> dict[str, str]:
    """Module -> what of megatron or torch.distributed it imports, or the module through which it does."""
    found: dict[str, str] = {}
    seen = {
        name: imports(path.read_text(encoding="utf-8"), name, path.name == "__init__.py")
        for name, path in MODULES.items()
    }
    for name, names in seen.items():
        bad = [each for each in names if any(each == word or each.startswith(word + ".") for word in FORBIDDEN_IN_PURE)]
        if bad:
            found[name] = min(bad)
    while more := {
        name: min(through)
        for name, names in seen.items()
        if name not in found and (through := [each for each in names if each in found])
    }:
        found |= more
    return found


def is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below `node`, functions' bodies included, without what stands under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and is_type_checking(child.test):
            for other in child.orelse:
                yield other
                yield from executed(other)
            continue
        yield child
        yield from executed(child)


def imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """Dotted names that `source` imports, at any depth; of `from a import b` both `a` and `a.b`."""
    names: set[str] = set()
    for node in executed(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: None if is_package and node.level == 1 else -node.level + is_package]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            names.update(str(word.value) for word in node.args[:1] if isinstance(word, ast.Constant))
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            names.add("torch.distributed")
    return names


def violations(source: str, module: str, is_package: bool = False, modules: set[str] | None = None) -> list[str]:
    """What in `source` breaks the rule, one sentence each."""
    found = []
    known = set(MODULES) if modules is None else modules
    for name in sorted(imports(source, module, is_package)):
        if name not in known or name == "minitron_mcore":
            continue
        same_floor = not is_config(name) and floor(name) == floor(module) > 0 and room(name) != room(module)
        if floor(name) > floor(module):
            found.append(f"{module} imports {name}, which is above it")
        elif same_floor:
            found.append(f"{module} imports {name}, which is beside it")
    return found


@pytest.mark.parametrize("module", [name for name in MODULES if name != "minitron_mcore"])
def test_imports_point_down(module: str) -> None:
    path = MODULES[module]
    assert violations(path.read_text(encoding="utf-8"), module, path.name == "__init__.py") == []


def test_pure_modules() -> None:
    found = impure()
    assert [f"{name} is pure and imports {found[name]}" for name in MODULES if says_pure(name) and name in found] == []


def test_only_runtime_knows_parallel_state() -> None:
    """Elsewhere Megatron's groups come from runtime/groups.py."""
    name = "megatron.core.parallel_state"
    found = {
        module
        for module, path in MODULES.items()
        if room(module) != "runtime" and name in imports(path.read_text(encoding="utf-8"), module)
    }
    assert found == set()


def test_impurity_is_seen() -> None:
    found = impure()
    assert found["minitron_mcore.model.gpt"].startswith("megatron")
    assert found["minitron_mcore.training.loop"] and "minitron_mcore.pruning.plan" not in found


def test_what_resolves_and_what_configures_is_pure() -> None:
    found = impure()
    assert [
        name for name in MODULES if is_config(name) or room(name) in ("recipe", "estimate", "jobs") if name in found
    ] == []


def test_no_circle_of_modules() -> None:
    """Imports inside functions count; those for type checking alone do not."""
    left = {
        name: imports(path.read_text(encoding="utf-8"), name, path.name == "__init__.py") & MODULES.keys() - {name}
        for name, path in MODULES.items()
    }
    # What imports nothing that is left, and what nothing left imports, is in no circle.
    while outside := [
        name
        for name, names in left.items()
        if not names & left.keys() or not any(name in others for others in left.values())
    ]:
        for name in outside:
            del left[name]
    assert sorted(left) == []


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=module_name)
def test_package_files_hold_no_code(path: Path) -> None:
    """An import in `__init__.py` would load what nobody asked for; the package's docstring and version are words."""
    code = [
        statement
        for statement in ast.parse(path.read_text(encoding="utf-8")).body
        if not (isinstance(statement, ast.Expr | ast.Assign) and isinstance(statement.value, ast.Constant))
    ]
    assert code == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("minitron_mcore.training.config", "from .loop import train"),
        ("minitron_mcore.layout", "from minitron_mcore.runtime.start import Runtime"),
        ("minitron_mcore.model.gpt", "def f():\n    import minitron_mcore.training.loop"),
        ("minitron_mcore.checkpoint.store", "from minitron_mcore.data import dataset"),
        ("minitron_mcore.checkpoint.store", "from ..data import dataset"),
        ("minitron_mcore.training.loop", "from minitron_mcore.stages import train"),
        ("minitron_mcore.training.loop", "import importlib\nimportlib.import_module('minitron_mcore.cli')"),
        (
            "minitron_mcore.layout",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\nelse:\n    import minitron_mcore.cli",
        ),
    ],
)
def test_the_rule_refuses(module: str, source: str) -> None:
    modules = {f"minitron_mcore.{rest}" for rest in ("runtime.start", "training.loop", "data", "data.dataset")}
    modules |= {f"minitron_mcore.{rest}" for rest in ("stages", "stages.train", "cli")}
    assert violations(source, module, modules=modules)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("minitron_mcore.pruning.plan", "import torch\nfrom minitron_mcore.layout import TABLE"),
        ("minitron_mcore.recipe", "from minitron_mcore.training.config import TrainConfig"),
        ("minitron_mcore.training.loop", "from . import metrics\nfrom ..evaluation.loss import evaluate"),
        ("minitron_mcore.stages.run", "from minitron_mcore.stages import train"),
        (
            "minitron_mcore.layout",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from minitron_mcore.runtime.start import Runtime",
        ),
    ],
)
def test_the_rule_allows(module: str, source: str) -> None:
    modules = {"minitron_mcore.layout", "minitron_mcore.training.config", "minitron_mcore.training.metrics"}
    modules |= {f"minitron_mcore.{rest}" for rest in ("evaluation.loss", "stages.train", "runtime.start")}
    assert violations(source, module, modules=modules) == []


def test_a_module_without_a_level_is_refused() -> None:
    with pytest.raises(AssertionError, match="attic"):
        floor("minitron_mcore.attic.box")
