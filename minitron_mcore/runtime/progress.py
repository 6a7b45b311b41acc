"""How far long work is: a bar on a terminal, now and then a dated line in a file, nothing on the other ranks. Pure.

    with runtime.progress(len(samples), "samples", "score") as bar:  # every rank, or the first alone
        for batch in batches:
            ...
            bar.advance(len(batch))  # or bar.reach(done), or `for batch in bar.over(batches, len)`

`total` may be None, where nobody knows it: then the time so far is shown. Bytes have the unit "B". What is printed
meanwhile, to stdout or stderr, comes above the bar, whole; a bar goes when its `with` ends, however that ends, so the
stage itself says what it has done. Bars may be nested. Work that prints lines of its own with rate and time left, as a
training does, asks for `lines=False`: in a file nothing is added to them.

A terminal is a standard output that is one, and no TERM=dumb. The key `log.progress`, or where it says auto the
variable MINITRON_PROGRESS, chooses: auto, bar, lines, none. A line comes every tenth of the work, but not more often
than every ten seconds and not more seldom than every five minutes, so short work prints none.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import cache
from typing import Any, ClassVar, TypeVar
from weakref import WeakSet

from minitron_mcore.errors import InputError
from minitron_mcore.runtime.pace import Pace, duration
from minitron_mcore.runtime.pulse import PULSE

T = TypeVar("T")
# A stage's `runtime.progress`, or `progress`, as the libraries take it.
Progress = Callable[..., contextlib.AbstractContextManager["Bar"]]
STYLES = ("auto", "bar", "lines", "none")
VARIABLE = "MINITRON_PROGRESS"
SOONEST, LATEST, PARTS = 10.0, 300.0, 10  # seconds between two lines, and how many there are in between


def chosen(style: str, environment: Mapping[str, str] = os.environ) -> str:
    """bar, lines or none: what `style` and the environment ask for. Raises InputError for another word."""
    style = environment.get(VARIABLE) or "auto" if style == "auto" else style
    if style not in STYLES:
        raise InputError(VARIABLE, style, f"must be one of {', '.join(STYLES)}", "or leave it unset")
    if style != "auto":
        return style
    return "bar" if is_terminal(sys.stdout) and environment.get("TERM") != "dumb" else "lines"


def is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # a stand-in for a stream, or one that is closed
        return False


@contextlib.contextmanager
def progress(
    total: float | None, unit: str, title: str, *, style: str = "auto", done: float = 0, lines: bool = True
) -> Iterator[Bar]:
    """Within the `with` the work `title` goes from `done` to `total` units. style: none on ranks that show nothing."""
    style = chosen(style)
    if style == "none" or (style == "lines" and not lines):
        yield Bar(total, done)
        return
    bar = (_Lines if style == "lines" else _Drawn)(total, unit, title, done)
    with bar.shown():
        yield bar


SILENT = functools.partial(progress, style="none")


class Bar:
    """How far the work is. This one shows nothing."""

    def __init__(self, total: float | None, done: float) -> None:
        self.total, self.done = total, done

    def advance(self, units: float = 1) -> None:
        self.reach(self.done + units)

    def reach(self, done: float) -> None:
        """`done` units of the total are done; the work never goes back, nor beyond its end."""
        self.done = max(self.done, done if self.total is None else min(done, self.total))
        PULSE.move()
        self.show()

    def over(self, items: Iterable[T], units: Callable[[T], float] = lambda item: 1) -> Iterator[T]:
        """`items`, each of which counts as `units(item)` once the next one is asked for."""
        for item in items:
            yield item
            self.advance(units(item))

    def show(self) -> None:
        """Show how far it is, where that is due. Work whose total nobody knows calls it now and then."""


class _Lines(Bar):
    def __init__(self, total: float | None, unit: str, title: str, done: float) -> None:
        super().__init__(total, done)
        self.unit, self.title, self.pace = unit, title, Pace(done)
        self._said = self._told = 0.0  # seconds, and units, at the last line

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        yield
        if self._said and self.done > self._told:
            self._say()

    def show(self) -> None:
        whole = 0.0
        if self.total is not None and self.done > self.pace.before:
            whole = self.pace.seconds + self.pace.left(self.done, self.total)
        if self.pace.seconds - self._said >= min(max(whole / PARTS, SOONEST), LATEST):
            self._say()

    def _say(self) -> None:
        self._said, self._told = self.pace.seconds, self.done
        print(f"{datetime.now():%Y-%m-%d %H:%M:%S} | {self.title}: {self.in_words()}", flush=True)

    def in_words(self) -> str:
        """As in `32/64 samples (50%) | 3.2 samples/s | 0:00:10 left`."""
        size, unit = (1e6, "MB") if self.unit == "B" else (1, self.unit)
        so_far = duration(self.pace.seconds)
        if self.total is None:
            return f"{self.done / size:,.4g} {unit} after {so_far}" if self.done else f"{so_far} so far"
        done = f"{self.done / size:,.{1 if unit == 'MB' else 0}f}/{self.total / size:,.{1 if unit == 'MB' else 0}f}"
        rate = f"{self.pace.rate(self.done) / size:,.3g} {unit}/s"
        left = "done" if self.done >= self.total else f"{duration(self.pace.left(self.done, self.total))} left"
        if self.done <= self.pace.before:
            rate, left = f"{so_far} so far", "? left"
        return f"{done} {unit} ({100 * self.done / max(self.total, 1e-9):.0f}%) | {rate} | {left}"


class _Drawn(Bar):
    """A bar of tqdm's at the foot of the terminal."""

    def __init__(self, total: float | None, unit: str, title: str, done: float) -> None:
        super().__init__(total, done)
        space = "" if unit == "B" else " "
        shape = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{unit}, {rate_noinv_fmt}, {remaining} left"
        if total is None:
            shape = "{desc}: {n_fmt}{unit}, {elapsed}" if unit else "{desc}: {elapsed}"
        self._bar = _tqdm()(
            total=total,
            desc=title,
            unit=space + unit,
            unit_scale=unit == "B" or (total or 0) > 99_999,
            initial=done,
            leave=False,
            disable=False,  # whatever TQDM_DISABLE says, which silences those of libraries
            file=_under(sys.stdout),
            ncols=_columns(),
            nrows=20,  # a terminal may say that it has none, and would be shown none
            bar_format=shape,
        )

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        with contextlib.ExitStack() as streams:
            if not isinstance(sys.stdout, _Above):
                # stderr first: its rest is written before that of stdout.
                for redirect, stream in (
                    (contextlib.redirect_stderr, sys.stderr),
                    (contextlib.redirect_stdout, sys.stdout),
                ):
                    if is_terminal(stream):
                        above = _Above(stream)
                        streams.callback(above.end)
                        streams.enter_context(redirect(above))  # type: ignore[type-var]
            streams.callback(self._bar.close)  # before the rest of a line is written
            yield

    def show(self) -> None:
        self._bar.ncols = _columns()
        if self.total is None:
            self._bar.n = self.done
            self._bar.refresh()
        else:
            self._bar.update(self.done - self._bar.n)


def _columns() -> int:
    """Of the terminal, or as COLUMNS says; a line that fills the last one would wrap on some."""
    return max(shutil.get_terminal_size().columns - 1, 20)


def _under(stream: Any) -> Any:
    return stream.under if isinstance(stream, _Above) else stream


class _Above:
    """A stream of the terminal whose lines come above the bars."""

    def __init__(self, stream: Any) -> None:
        self.under, self._begun, self._process = stream, "", os.getpid()

    def write(self, text: str) -> int:
        if os.getpid() != self._process:  # a forked reader of data has no bar
            return int(self.under.write(text))
        *lines, begun = (self._begun + text).split("\n")
        self._begun = begun
        if lines:
            self._write("".join(f"{line}\n" for line in lines))
        return len(text)

    def _write(self, text: str) -> None:
        kind = _tqdm()
        with kind.get_lock():
            bars = [bar for bar in kind._instances if not bar.disable]
            for bar in bars:
                bar.clear(nolock=True)
            self.under.write(text)
            self.under.flush()
            for bar in bars:
                bar.refresh(nolock=True)

    def flush(self) -> None:
        self.under.flush()

    def end(self) -> None:
        """Pass on what has no line end yet."""
        begun, self._begun = self._begun, ""
        if begun:
            self._write(begun)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.under, name)


@cache
def _tqdm() -> Any:
    """tqdm's bar, without its thread and the lock of several processes, which a fork would share."""
    from tqdm import tqdm

    class Drawn(tqdm):
        monitor_interval = 0
        _instances: ClassVar[Any] = WeakSet()  # of ours alone: libraries draw bars too

    Drawn.set_lock(threading.RLock())
    return Drawn
