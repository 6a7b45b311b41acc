"""Small files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from minitron_mcore.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def writing(what: str) -> Iterator[None]:
    """A full or forbidden disk is the user's to mend: an OSError within becomes one sentence that names `what`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{what} cannot be written: {error}") from error


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that no reader ever sees half of it. One process calls."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_figure(path: Path, figure: Figure) -> None:
    """A matplotlib figure as PNG, whole or not at all. One process calls."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    partial = path.with_name(path.name + ".tmp")
    FigureCanvasAgg(figure).print_png(str(partial))
    os.replace(partial, path)


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a small YAML file that lies beside a checkpoint. Raises InputError where it holds none."""
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path} holds no mapping of names to values")
    return fields
