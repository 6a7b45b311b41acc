"""Print what the interpreter that runs this lacks of setup.py, but for the tools that only look at the source.

And megatron-core, where it is not 0.19 or newer: this is for the environment of that pair (matrix.sh).
"""

import ast
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

NOT_NEEDED = {"ruff", "mypy", "types-PyYAML", "pre-commit"}


def lacking(lines: list[str]) -> list[str]:
    found = []
    for wanted in map(Requirement, lines):
        try:
            fits = wanted.specifier.contains(version(wanted.name), prereleases=True)
        except PackageNotFoundError:
            fits = False
        if not fits and wanted.name not in NOT_NEEDED and (wanted.marker is None or wanted.marker.evaluate()):
            found.append(str(wanted))
    return found


if __name__ == "__main__":
    source = ast.parse((Path(__file__).parents[1] / "setup.py").read_text(encoding="utf-8"))
    lists = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in source.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List) and isinstance(node.targets[0], ast.Name)
    }
    print(*lacking(["megatron-core>=0.19", *lists["REQUIREMENTS"], *lists["PARQUET"], *lists["DEVELOPMENT"]]), sep=", ")
