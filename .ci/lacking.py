"""Print what this interpreter lacks of pyproject.toml's requirements, except the tools that tests do not need.

And megatron-core, where it is older than 0.19: this is for the environment of that pair (matrix.sh).
"""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NOT_NEEDED = {"coverage", "ruff", "mypy", "types-PyYAML", "pre-commit"}
# The site is built, and looked at, in the other environment alone.
NOT_NEEDED |= {"sphinx", "myst-parser", "myst-nb", "furo", "latex2mathml", "nbclient", "nbformat"}


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
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    development = project["optional-dependencies"]["dev"]
    print(*lacking(["megatron-core>=0.19", *project["dependencies"], *development]), sep=", ")
