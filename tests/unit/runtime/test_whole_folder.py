"""A folder is there whole or not at all, and the one that stood there before goes only when the new one takes over."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from minitron_mcore.errors import InputError
from minitron_mcore.runtime import whole_folder as module
from minitron_mcore.runtime.whole_folder import whole_folder


def write(target: Path, text: str) -> None:
    with whole_folder(target, f"checkpoint={target}") as place:
        for name in ("one", "two"):
            (place / name).write_text(text)


def read(target: Path) -> set[str]:
    return {path.read_text() for path in target.iterdir()}


@pytest.fixture(params=["exchange", "renames"])
def target(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the system can exchange two names, and where it cannot."""
    if request.param == "renames":
        monkeypatch.setattr(module.ctypes, "CDLL", lambda name: SimpleNamespace())
    return tmp_path / "folder"


def test_whole_or_not_at_all(target: Path) -> None:
    write(target, "old")
    assert read(target) == {"old"}
    with pytest.raises(KeyError), whole_folder(target, "") as place:
        (place / "one").write_text("half")
        raise KeyError
    assert read(target) == {"old"}
    write(target, "new")
    assert read(target) == {"new"} and list(target.parent.iterdir()) == [target]


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=" cannot be written: "):
        write(tmp_path / "file" / "folder", "")


def test_a_killed_process_leaves_the_old_or_the_new(target: Path) -> None:
    """It ends before or after each of the calls that rename or delete, and the next one finds a whole folder."""

    def fatal(call: Callable[..., None], calls: list[int], last: int, after: bool) -> Callable[..., None]:
        def counted(*arguments: object, **named: object) -> None:
            calls.append(0)
            if len(calls) == last and not after:
                os._exit(9)
            call(*arguments, **named)
            if len(calls) == last:
                os._exit(9)

        return counted

    found: list[set[str]] = []
    for last in range(1, 20):
        for after in (False, True):
            shutil.rmtree(target.parent)
            target.parent.mkdir()
            write(target, "old")
            child = os.fork()
            if child == 0:
                calls: list[int] = []
                os.replace = fatal(os.replace, calls, last, after)  # type: ignore[assignment]
                shutil.rmtree = fatal(shutil.rmtree, calls, last, after)  # type: ignore[assignment]
                write(target, "new")
                os._exit(0)
            if os.waitpid(child, 0)[1] == 0:
                assert {"old"} in found and {"new"} in found
                return
            with pytest.raises(KeyError), whole_folder(target, ""):
                raise KeyError
            found.append(read(target))
            assert found[-1] in ({"old"}, {"new"}) and len(list(target.iterdir())) == 2
    raise AssertionError("the child never ended")
