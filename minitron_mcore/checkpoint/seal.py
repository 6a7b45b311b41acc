"""What is lent to a pickle, and is to come back as it was. Pure.

A pickle can set the attributes of whatever it is given: those of an admitted class too, its name among them, and of an
enum's members. Nothing of that is code, but what reads the checkpoint next would be told something else by it.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

_OF_CLASSES = ("__name__", "__qualname__", "__bases__")  # in no class's own dictionary


class Seal:
    """Remembers classes, functions and enum members as they were when they were put under it."""

    def __init__(self) -> None:
        self._lent: dict[int, tuple[Any, dict[str, Any]]] = {}

    def put(self, lent: Any) -> Any:
        """`lent`, which a pickle may have from now on."""
        members = lent.__members__.values() if isinstance(lent, type) and issubclass(lent, Enum) else ()
        for each in (lent, *members):
            if hasattr(each, "__dict__"):
                self._lent.setdefault(id(each), (each, _state(each)))
        return lent

    def restore(self) -> str | None:
        """Undo what was changed; the first thing that was, by its name, or None."""
        changed = None
        for lent, before in self._lent.values():
            now = _state(lent)
            for name in (*before, *now.keys() - before.keys()):
                if name in before and name in now and _is_same(name, now[name], before[name]):
                    continue
                changed = changed or f"{before.get('__qualname__', type(lent).__qualname__)}.{name}"
                if not isinstance(lent, type):
                    vars(lent).pop(name, None)
                    vars(lent).update({name: before[name]} if name in before else {})
                elif name in before:
                    type.__setattr__(lent, name, before[name])
                else:
                    type.__delattr__(lent, name)
        return changed


def _is_same(name: str, now: Any, before: Any) -> bool:
    return now is before or (name in _OF_CLASSES and now == before)  # some are made anew whenever they are asked for


def _state(lent: Any) -> dict[str, Any]:
    return {**vars(lent), **({name: getattr(lent, name) for name in _OF_CLASSES} if isinstance(lent, type) else {})}
