"""How much a reader has to read to follow one distillation step from training/step.py to the gradient.

    python benchmarks/reading.py [--states]

Takes one step of a tiny student (one rank, the teacher in memory, forward KL; with `--states` a hidden-state loss too)
and lists every function of the engine's rooms that runs, and every record that is made, with its lines: signature,
docstring, comments and body. Of a record its fields are counted; its methods where they run.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PACKAGE = ROOT / "minitron_mcore"
ROOMS = ("training/step.py", "distillation/", "model/schedule.py", "model/microbatch.py", "model/vocab_parallel.py")


def traced_step(with_states: bool) -> set[tuple[str, int]]:
    """(file, first line) of every definition of the package that a step runs."""
    from minitron_mcore.training.step import Trained, train_step
    from tests.distributed import state_loss_problem as problem
    from tests.distributed.models import global_batch, my_batch, start_layout, steady

    layout = start_layout({}, 1)
    from minitron_mcore.training.config import TrainConfig
    from minitron_mcore.training.step import build_optimizer, build_scheduler, wrap_model

    case = problem.Case(("block_output",))
    models, objective = problem.build(case, layout)
    if not with_states:
        objective.states = None
        objective.teacher.want_states([], case.student.num_layers)
    chunks = wrap_model(models)
    train = TrainConfig(lr=1e-2, min_lr=1e-3, global_batch_size=8, micro_batch_size=2)
    optimizer, timetable = build_optimizer(chunks, train, "fp32"), steady(train, iterations=20)
    scheduler = build_scheduler(optimizer, train, timetable)
    batch, seen = my_batch(global_batch(case.student.vocab_size)), set()

    def profile(frame: Any, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)):
            seen.add((code.co_filename, code.co_firstlineno))
        elif event == "call" and code.co_filename == "<string>" and code.co_name == "__init__":
            record = type(frame.f_locals[code.co_varnames[0]])
            if record.__module__.startswith(PACKAGE.name):
                seen.add((inspect.getsourcefile(record) or "", inspect.getsourcelines(record)[1]))

    threading.setprofile(profile)  # backward runs in a thread of its own
    sys.setprofile(profile)
    try:
        train_step(Trained(chunks, optimizer, scheduler), objective, timetable.at(0).shape, batch)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return seen


def definitions(path: Path, starts: set[int]) -> Iterator[tuple[str, int]]:
    """(name, lines) of the definitions of a file that begin at one of `starts`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for outer in tree.body:
        if isinstance(outer, ast.FunctionDef) and {outer.lineno, first_line(outer)} & starts:
            yield outer.name, length(outer)
        if isinstance(outer, ast.ClassDef):
            methods = [each for each in outer.body if isinstance(each, ast.FunctionDef)]
            if {outer.lineno, first_line(outer)} & starts:
                yield outer.name, length(outer) - sum(map(length, methods))
            for method in methods:
                if {method.lineno, first_line(method)} & starts:
                    yield f"{outer.name}.{method.name}", length(method)


def first_line(node: ast.FunctionDef | ast.ClassDef) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def length(node: ast.FunctionDef | ast.ClassDef) -> int:
    return (node.end_lineno or node.lineno) - first_line(node) + 1


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--states", action="store_true", help="a hidden-state loss too")
    options = parser.parse_args()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29611", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    seen = traced_step(options.states)
    rows = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(PACKAGE))
        starts = {line for file, line in seen if file == str(path)}
        if name.startswith(ROOMS) and starts:
            rows += [(name, definition, lines) for definition, lines in definitions(path, starts)]
    for name, definition, lines in rows:
        print(f"{lines:5} {name} {definition}")
    files, lines = {row[0] for row in rows}, sum(row[2] for row in rows)
    print(json.dumps({"benchmark": "reading", "definitions": len(rows), "files": len(files), "lines": lines}))


if __name__ == "__main__":
    main()
