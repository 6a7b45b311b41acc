"""What libraries warn of, which a user can do nothing about: set aside in a file, off the console. Pure.

    runs/quickstart/libraries.log     2026-11-30 08:12:03 WARNING megatron.core.utils: Apex is not installed …

Python's warnings and what is logged below ERROR go there, each text once, from the first rank; the same on the others
is dropped. Errors stay on the console, of every rank. What C++ writes on its own and the bars that libraries draw are
switched off by their environment variables, where nobody has set them. The key `log.libraries` may leave all of it on
the console, or nowhere.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

FILE = "libraries.log"
# Read when the libraries are loaded.
SWITCHES = {
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "GLOG_minloglevel": "2",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "TQDM_DISABLE": "1",
}
MOST = 1000  # texts that are kept in memory
_CONSOLE = logging.StreamHandler
# How transformers reads a folder as data: none of its own code is run, and nobody is asked at the terminal for leave.
AS_DATA: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
# A config.json may name a kernel of the hub's, which would be fetched and run; and weights may be pickles.
MODEL_AS_DATA: dict[str, Any] = {**AS_DATA, "attn_implementation": None, "use_safetensors": True}


class _Aside(logging.Handler):
    """Keeps what comes until there is a folder for it."""

    def __init__(self, keeps: bool) -> None:
        super().__init__()
        self.keeps = keeps
        self.folder: Path | None = None
        self._seen: set[str] = set()
        self._waiting: list[str] = []
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%d %H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.ERROR:
            print(f"{record.name}: {text}", file=sys.stderr, flush=True)
        if not self.keeps or text in self._seen or len(self._seen) >= MOST:
            return
        self._seen.add(text)
        self._waiting.append(self.format(record))
        self.write()

    def warned(self, message: Any, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
        """As `warnings.showwarning`."""
        words = f"{category.__name__}: {message} ({filename}:{lineno})"
        record = {"name": "warnings", "levelno": logging.WARNING, "levelname": "WARNING", "msg": words}
        self.handle(logging.makeLogRecord(record))

    def write(self) -> None:
        """Append what waits to the file, once its folder is there: none is made for it."""
        if self._waiting and self.folder is not None and self.folder.is_dir():
            with suppress(OSError), (self.folder / FILE).open("a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in self._waiting))
                self._waiting.clear()


_aside: _Aside | None = None


@contextmanager
def set_aside(way: str, is_main: bool) -> Iterator[None]:
    """Within the `with`, libraries say nothing on the console but errors. way: file, console or none."""
    global _aside
    if way == "console":
        yield
        return
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
    shown, handler = warnings.showwarning, _Aside(keeps=way == "file" and is_main)
    warnings.showwarning = handler.warned  # type: ignore[assignment]  # it leaves out what it does not use
    logging.root.addHandler(handler)
    _aside = handler
    adopt()
    try:
        yield
    finally:
        handler.write()
        _aside, warnings.showwarning = None, shown
        logging.root.removeHandler(handler)


def write_to(folder: Path | None) -> None:
    """Where what was set aside belongs, from here on."""
    if _aside is not None and folder is not None:
        _aside.write()
        _aside.folder = folder
        _aside.write()


def adopt() -> None:
    """Take over from the handlers with which a library writes to the console on its own, as it does once imported."""
    if _aside is None:
        return
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if not isinstance(logger, logging.Logger) or ("TORCH_LOGS" in os.environ and name.startswith("torch")):
            continue
        for handler in [each for each in logger.handlers if type(each) is _CONSOLE]:
            logger.removeHandler(handler)
            logger.propagate = True


def imported(name: str) -> Any:
    """A library that is imported late, and writes no warnings to the console."""
    module = importlib.import_module(name)
    adopt()
    return module


def quiet_libraries() -> None:
    """For a notebook, whose warnings are not ours to take: drop those about optional parts, as Apex."""
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    warnings.filterwarnings("ignore", message=r".*(pynvml|No CUDA|destroy_process_group|is not a CUDA).*")
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\..* is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r"Please use DTensor instead", category=FutureWarning)
    for name in ("megatron", "torch.distributed.elastic", "torch.distributed.checkpoint"):
        logging.getLogger(name).setLevel(logging.ERROR)
