"""Warnings of libraries lie in a file, once each; errors are on the console; nothing stays changed."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from pathlib import Path
from unittest import mock

import pytest

from minitron_mcore.runtime import libraries
from minitron_mcore.runtime.libraries import FILE, imported, set_aside, write_to

# It logs to the console by a handler of its own and passes nothing on, as transformers does.
LIBRARY = """
import logging, warnings
log = logging.getLogger("chatty_library")
log.addHandler(logging.StreamHandler())
log.propagate = False
warnings.warn("imported without Apex", FutureWarning)

def work():
    logging.getLogger("chatty_library.part").warning("slow %s", "path")
    log.warning("slow path")
    log.error("broken pipe")
    warnings.warn("deprecated", UserWarning)
"""


def without_switches() -> dict[str, str]:
    """The environment without what a command of another test, in this process, has set."""
    return {name: value for name, value in os.environ.items() if name not in libraries.SWITCHES}


def use_it(folder: Path, way: str, is_main: bool = True, output: Path | None = None) -> None:
    """Import the library and have it work, as a stage does that is told its folder in between."""
    (folder / "chatty_library.py").write_text(LIBRARY)
    sys.modules.pop("chatty_library", None)
    logging.getLogger("chatty_library").handlers.clear()
    with (
        mock.patch.object(sys, "path", [str(folder), *sys.path]),
        mock.patch.dict(os.environ, without_switches(), clear=True),
        warnings.catch_warnings(),
        set_aside(way, is_main),
    ):
        warnings.simplefilter("always")
        library = imported("chatty_library")
        write_to(output)
        library.work()
        library.work()
        assert os.environ.get("TQDM_DISABLE") == (None if way == "console" else "1")


def test_warnings_are_in_the_file_and_errors_on_the_console(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = warnings.showwarning, list(logging.root.handlers)
    use_it(tmp_path, "file", output=tmp_path)
    assert capsys.readouterr() == ("", "chatty_library: broken pipe\n" * 2)
    lines = (tmp_path / FILE).read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (WARNING|ERROR) ", line) for line in lines)
    told = [line.split(" ", 3)[3] for line in lines]
    assert [re.sub(r" \(.*", "", words) for words in told] == [
        "warnings: FutureWarning: imported without Apex",
        "chatty_library.part: slow path",
        "chatty_library: broken pipe",
        "warnings: UserWarning: deprecated",
    ], "in order, each text once"
    assert (warnings.showwarning, logging.root.handlers, libraries._aside) == (*before, None)


def test_other_ranks_and_none_write_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for way, is_main in (("file", False), ("none", True)):
        use_it(tmp_path, way, is_main, tmp_path)
        assert capsys.readouterr() == ("", "chatty_library: broken pipe\n" * 2)
    use_it(tmp_path, "file", output=tmp_path / "not there")
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".py" and path.name != "__pycache__"] == []


def test_on_the_console_all_is_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        use_it(tmp_path, "console", output=tmp_path)
    said = capsys.readouterr().err
    assert said.count("slow path\n") == 4 and said.count("broken pipe\n") == 2
    assert not (tmp_path / FILE).exists() and len(caught) == 3
