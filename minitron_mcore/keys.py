"""Sections of a recipe: dataclasses whose keys state their meaning, range and choices, once, and check them. Pure.

    @section
    class EvaluateConfig:
        samples: int = key(64, "sequences of the validation set", at_least=1)

Pydantic checks a section whenever it is made: from a recipe's text, in Python, or by `dataclasses.replace`. What holds
between keys stands in the section's `__post_init__`. A user sees InputError alone, with the key's name in its section;
the reader of a recipe puts the section's path before it.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar, Union

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import core_schema
from typing_extensions import dataclass_transform

from minitron_mcore.errors import InputError


class OneOf:
    """What a text may be: Annotated[str, OneOf("mean", "l2")]."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.literal_schema(list(self.words))


# A file or folder: in a recipe's text `~` and environment variables are expanded in it.
_PATH = "path"
PathName = Annotated[str, _PATH]
# What text is read from: a file, folder or glob, or a list of them.
Sources = Union[PathName, list[PathName], None]
# A prefix, a list of prefixes, or weights and prefixes in turn, as a list or as one string.
Blend = Union[PathName, list[Union[float, PathName]], None]

BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
_CONSTRAINTS = {words.replace(" ", "_"): constraint for constraint, words in BOUNDS.items()}
NO_KEY = "is not a key of a recipe"
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_T = TypeVar("_T")


def key(
    default: Any,
    meaning: str,
    *,
    filled: bool = False,
    distinct: bool = False,
    remedy: str = "",
    may_change: bool = False,
    budget: bool = False,
    compare: bool = True,
    **bounds: float,
) -> Any:
    """A key of a section: its default (of a section, its class), what it means, and what it may be.

    filled: a list needs an entry; distinct: it names each once. remedy: what to do about a value out of range.
    may_change: a run that goes on may have another value, since the results do not depend on it, or by no more than the
    rounding of narrow types. budget: it says how long a training is, and may change with what is left of it. compare:
    sections that differ in it are not equal. bounds: at_least, above, at_most or below.
    """
    metadata = {
        **{_CONSTRAINTS[name]: bound for name, bound in bounds.items()},
        "description": meaning,
        "filled": filled,
        "distinct": distinct,
        "remedy": remedy,
        "may_change": may_change,
        "budget": budget,
    }
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=functools.partial(copy.deepcopy, default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata, compare=compare)


@dataclass_transform()
def section(kind: type[_T]) -> type[_T]:
    """Class decorator: a dataclass of keys that raises InputError for a value, or a combination, that cannot be."""
    made: Any = dataclass(config=_STRICT)(kind)
    make = made.__init__

    @functools.wraps(make)
    def checked(self: Any, *values: Any, **named: Any) -> None:
        try:
            make(self, *values, **named)
        except ValidationError as error:
            raise _refusal(made, error) from None
        _check_lists(self)

    made.__init__ = checked
    return made


def section_at(path: str, kind: type[_T], values: Mapping[str, Any]) -> _T:
    """The section of `values`; its errors name the keys below `path`, "" for the recipe itself."""
    try:
        return kind(**values)
    except InputError as error:
        raise (error.under(path) if path else error) from None


def refuse_idle(config: Any, idle: Mapping[str, str], remedy: str) -> None:
    """Raise InputError where a key is given that has no effect, so that nobody waits for one.

    idle: key -> with what it has none, as in `has no effect with …`. A key at its default counts as left out.
    """
    for entry in dataclasses.fields(config):
        if entry.name in idle and (value := getattr(config, entry.name)) != default_of(entry):
            raise InputError(entry.name, value, f"has no effect {idle[entry.name]}", remedy)


def _check_lists(config: Any) -> None:
    """Raise InputError for a list that names an entry twice, or has none where it needs one."""
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if entry.metadata.get("filled") and value is not None and not value:
            raise InputError(entry.name, value, "is empty", "name at least one, or leave the key out")
        if entry.metadata.get("distinct"):
            for place, each in enumerate(value if isinstance(value, list) else ()):
                if each in value[:place]:
                    raise InputError(entry.name, value, f"holds {each} twice", "name each once")


def default_of(entry: dataclasses.Field[Any]) -> Any:
    """The value of a key that is left out."""
    return entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()


def options_of(kind: Any) -> tuple[Any, ...]:
    """The types that a value may have; None's among them where the key may be null."""
    return typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)


def plain_type(kind: Any) -> Any:
    """A type without its annotations."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind


def is_path(kind: Any) -> bool:
    return typing.get_origin(kind) is Annotated and _PATH in typing.get_args(kind)


def choices_of(kind: Any) -> tuple[str, ...]:
    """The words that a value may be; () where it may be any."""
    marks = [mark for option in options_of(kind) for mark in typing.get_args(option)[1:]]
    return next((mark.words for mark in marks if isinstance(mark, OneOf)), ())


def section_of(kind: Any) -> Any:
    """The section among a value's types; None where there is none."""
    return next((option for option in options_of(kind) if dataclasses.is_dataclass(option)), None)


def type_words(kind: Any) -> str:
    """What a value of the type is, in words."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    origins = {list: "a list as in [first,second]", dict: "a section of keys"}
    words = []
    for option in map(plain_type, options_of(kind)):
        words.append(names.get(option) or origins.get(typing.get_origin(option)) or "a section of keys")
    return " or ".join(words)


def refused_choice(path: str, value: object, choices: tuple[str, ...]) -> InputError:
    near = difflib.get_close_matches(str(value), choices, n=1)
    return InputError(path, value, f"must be one of {', '.join(choices)}", f"did you mean {near[0]}?" if near else "")


def _refusal(kind: type, error: ValidationError) -> InputError:
    """Pydantic's first finding in our words."""
    first = error.errors()[0]
    said = first.get("ctx", {})
    if isinstance(cause := said.get("error"), InputError):
        return cause
    name, *inner = first["loc"] or ("",)
    entries = dataclasses.fields(kind)
    entry = next((each for place, each in enumerate(entries) if name in (each.name, place)), None)
    if entry is None:
        return InputError(str(name), None, NO_KEY)
    value, path, place = first["input"], entry.name, entry.type
    for step in inner:  # a place in a list, a name in a dictionary; the rest are pydantic's for a union's members
        if isinstance(step, int):
            path, place = f"{path}[{step}]", entry_of(place)
        elif typing.get_origin(place) is dict:
            path, place = f"{path}.{step}", typing.get_args(place)[1]
    if first["type"] == "literal_error":
        return refused_choice(path, value, choices_of(place))
    if first["type"] != "finite_number" and not set(BOUNDS) & said.keys():
        return InputError(path, value, f"must be {type_words(place)}")
    return InputError(path, value, range_words({**said, **entry.metadata}, place), entry.metadata.get("remedy", ""))


def range_words(stated: Mapping[str, Any], kind: Any) -> str:
    """The rule that a number's bounds are."""
    if {"ge", "le"} <= stated.keys():
        return f"must lie between {stated['ge']} and {stated['le']}"
    bounds = [f"{words} {stated[bound]}" for bound, words in BOUNDS.items() if bound in stated]
    is_open = len(bounds) < 2 and float in map(plain_type, options_of(kind))
    return f"must be {' and '.join(['finite', *bounds] if is_open else bounds)}"


def entry_of(kind: Any) -> Any:
    """The type of a list's entries; None where the type is no list."""
    lists = [option for option in options_of(kind) if typing.get_origin(option) is list]
    return typing.get_args(lists[0])[0] if lists else None


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"teacher": {"iteration": 3}} -> {"teacher.iteration": 3}."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        result |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return result
