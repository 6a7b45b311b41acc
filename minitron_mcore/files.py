"""Small files that are whole or not there, and the errors for files that cannot be read or written."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from minitron_mcore.errors import InputError, StorageError

_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Tensors on their way from and to files (checkpoint/blocks.py).
BLOCK = 1 << 20  # bytes, which stay in a core's own cache: up to twice as fast as larger ones
MOST_THREADS = 4

# Errors of a disk that took less than was written, or that has gone; any other is there from the beginning.
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
FULL |= {errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO, errno.EHOSTDOWN, errno.ETIMEDOUT}


def shipped(name: str) -> Path:
    """Where `configs` or `launch` is: beside the package in a checkout, inside it once it is installed."""
    package = Path(__file__).resolve().parent
    return package / name if (package / name).is_dir() else package.parent / name


@contextmanager
def writing(what: str) -> Iterator[None]:
    """An OSError within becomes one sentence that names `what`: a StorageError where the disk is full or broken, an
    InputError otherwise."""
    try:
        yield
    except OSError as error:
        raise not_written(what, error) from error


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def not_written(what: str, error: OSError, hint: str = "") -> InputError:
    """The user's view of `error`, met while `what` was written; `hint` follows where the disk failed."""
    if error.errno in FULL:
        return StorageError("", what, "cannot be written", f"{error}{hint}")
    return InputError("", what, "cannot be written", str(error))


@contextmanager
def reading(what: str, remedy: str = "name another") -> Iterator[None]:
    """An OSError within, such as of a closed folder, becomes an InputError of one sentence that names `what`."""
    try:
        yield
    except OSError as error:
        raise not_read(what, error, remedy) from error


def not_read(what: str, error: OSError, remedy: str = "name another") -> InputError:
    """The user's view of `error`, met while `what` was read."""
    name = error.filename
    is_told = name is None or what == str(name) or what.endswith((f"={name}", f" {name}"))
    place = "" if is_told else f" at {name}"
    reason = (error.strerror or type(error).__name__).lower()
    mend = f"open it to this user, or {remedy}" if isinstance(error, PermissionError) else remedy
    return InputError("", what, f"cannot be read: {reason}{place}", mend)


def refuse_closed(what: str, path: str | Path) -> None:
    """Raise InputError, naming `what`, where this user may not read `path`. A missing one is not refused here."""
    with reading(what):
        try:
            mode = os.R_OK | (os.X_OK if stat.S_ISDIR(os.stat(path).st_mode) else 0)
        except (FileNotFoundError, NotADirectoryError):
            return
        if not os.access(path, mode, effective_ids=os.access in os.supports_effective_ids):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


SCORES_KIND = "is a scores file"


def kind_of(path: str | Path) -> str:
    """What lies at `path` where something else was asked for, as a rule says it; "" where nothing known does."""
    path = Path(path)
    if path.is_dir():
        described = (path / "architecture.yaml", path / "latest_checkpointed_iteration.txt")
        return "is a checkpoint" if any(file.is_file() for file in described) else "is a folder"
    if not path.is_file():
        return ""
    with path.open("rb") as stream:
        head = stream.read(4096)
    marks = {b'"minitron_plan"': "is a pruning plan", b"minitron_scores": SCORES_KIND}
    return next((words for mark, words in marks.items() if mark in head), "")


def nearest_folder(path: str | Path) -> Path:
    """`path`, or the innermost folder above it that is there."""
    folder = Path(path).absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Where to write the file `path`, which gets its name at the end of the `with`: whole or not at all. One process
    calls."""
    partial = Path(f"{path}.tmp")
    yield partial
    os.replace(partial, path)


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that no reader ever sees half of it. One process calls."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sync_small(folder: Path, but: tuple[str, ...]) -> None:
    """Have the files of a folder on its disk, not only in memory, without those whose names end with one of `but`, and
    the folder's list of names. Raises OSError."""
    for path in (*(path for path in folder.iterdir() if path.is_file() and not path.name.endswith(but)), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP):  # a file system that has no such call
                raise
        finally:
            os.close(descriptor)


def copy_file(source: str | Path, target: str | Path) -> None:
    """Copy a file byte for byte, folders made; whole or not at all. One process calls."""
    if os.path.abspath(source) == os.path.abspath(target):
        return
    os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
    with whole_file(target) as partial:
        shutil.copyfile(source, partial)


def write_figure(path: Path, figure: Figure) -> None:
    """A matplotlib figure as PNG, whole or not at all. One process calls."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with whole_file(path) as partial:
        FigureCanvasAgg(figure).print_png(str(partial))


def as_yaml(value: Any) -> str:
    """Plain data as YAML, in their order; by libyaml where it is there, ten times as fast."""
    return str(yaml.dump(value, Dumper=_DUMPER, sort_keys=False, allow_unicode=True))


def from_yaml(text: str) -> Any:
    """Raises yaml.YAMLError, in PyYAML's own words, which say more than libyaml's."""
    try:
        return yaml.load(text, _LOADER)
    except yaml.YAMLError:
        return yaml.safe_load(text)


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a small YAML file that lies beside a checkpoint. Raises InputError where it holds none."""
    with reading(str(path)):
        content = path.read_bytes()
    try:
        fields = from_yaml(content.decode("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError("", path, "is not YAML", " ".join(str(error).split())) from error
    if not isinstance(fields, dict):
        raise InputError("", path, "holds no mapping of names to values")
    return fields
