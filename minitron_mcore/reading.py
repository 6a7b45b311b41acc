"""A recipe's text to a section's values: YAML whose scalars keep their text, read by their key's type. Pure.

So `checkpoint=010` is the folder 010, and `tokens=94B` a whole number. In all texts `${key}` stands for another key of
the recipe; in paths `~` is the home folder, and `$NAME` or `${NAME}` an environment variable.
"""

from __future__ import annotations

import copy
import os
import re
import sysconfig
import typing
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import yaml

from minitron_mcore.errors import InputError
from minitron_mcore.keys import choices_of, is_path, options_of, plain_type, section_at, section_of, type_words

NULLS = ("", "null", "Null", "NULL", "~")
BOOLEANS = {word: value for value in (True, False) for word in (f"{value}", f"{value}".lower(), f"{value}".upper())}
# As people write counts: 94B, 1.5M, 128k; Ki, Mi and Gi are powers of 1024.
SUFFIXES = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
SUFFIXES |= {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}
MOST_DIGITS = 40
_COUNT = re.compile(r"([-+]?[\d_]*\.?[\d_]*(?:[eE][-+]?\d+)?)\s*([A-Za-z]*)")
_REFERENCE = re.compile(r"\$\{([^{}]*)\}")
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|([A-Za-z_]\w*))")
# At the start of a path, of one of a blend in one string, and of a cache's folder.
_HOME = re.compile(r"(?:(?<=^)|(?<=\s)|(?<=^cache:))~[^\s/]*")
# Names of variables that are not for a path, which logs and saved recipes show: WANDB_API_KEY, HF_TOKEN, https_proxy.
_SECRET = re.compile(r"(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|JWT|PAT|PROXY)$", re.IGNORECASE)
MOST_NODES = 100_000  # of a recipe, aliases spelled out
# `${python_stdlib:}` is real text that is on every machine: the Python standard library's own source.
STANDARD_LIBRARY = "python_stdlib:"

Unknown = Callable[[str, Any, list[str]], InputError]


class Plain(str):
    """A scalar without quotes: where the key allows, it may be null."""


class Loader(yaml.SafeLoader):
    """YAML without guesses: every scalar is text. Merge keys (<<) work; a key given twice is an error."""

    yaml_implicit_resolvers = {}  # noqa: RUF012

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        seen: set[str] = set()
        for name, _ in node.value:
            if name.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"found duplicate key {name.value}", name.start_mark
                )
            seen.add(name.value)
        super().flatten_mapping(node)


def _text(loader: Any, node: Any) -> str:
    return node.value if node.style else Plain(node.value)  # type: ignore[no-any-return]


Loader.add_constructor("tag:yaml.org,2002:str", _text)
Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])


def load_text(text: str) -> Any:
    """Nested dictionaries, lists and texts. Raises ValueError, in one line, for what is not YAML."""
    try:
        return _unshared(Loader(text).get_single_data(), [MOST_NODES])
    except RecursionError as error:
        raise ValueError("it refers to itself") from error
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        said = str(error).strip().split("\n")[0]
        said = f"{error.problem} in line {mark.line + 1}" if mark else said  # type: ignore[union-attr]
        raise ValueError(said) from error


def _unshared(node: Any, left: list[int]) -> Any:
    """A copy in which what an alias repeats is no longer one object. `left`: how many it may have; a few lines of
    aliases can be more than any memory holds. Raises ValueError."""
    left[0] -= 1
    if left[0] < 0:
        raise ValueError(f"its aliases stand for more than {MOST_NODES:,} values")
    if isinstance(node, dict):
        return {name: _unshared(value, left) for name, value in node.items()}
    return [_unshared(value, left) for value in node] if isinstance(node, list) else node


def override_value(text: str) -> Any:
    """What follows `key=` on the command line: a list, a section or quoted text as in YAML, anything else as it is."""
    return load_text(text) if text[:1] in tuple("[{'\"") else Plain(text)


def put(tree: dict[str, Any], path: str, value: Any, default: Callable[[str], Any]) -> None:
    """Set the key `path`, as in distill.phases[1].tokens, in `tree`; a section is merged with the one that is there;
    an empty one, {}, takes its place.

    default: what is at a path that the tree lacks. Raises InputError for an entry that a list lacks.
    """
    steps = [int(step[1:-1]) if step[0] == "[" else step for step in re.findall(r"[^.\[\]]+|\[\d+\]", path)]
    node: Any = tree
    walked = ""
    for place, step in enumerate(steps):
        if isinstance(step, int) and not (isinstance(node, list) and step < len(node)):
            count = len(node) if isinstance(node, list) else 0
            raise InputError(path, None, f"names entry {step}, counted from 0, but {walked} has {count}")
        there = node[step] if isinstance(step, int) else node.get(step)
        walked = f"{walked}[{step}]" if isinstance(step, int) else f"{walked}.{step}".lstrip(".")
        if place == len(steps) - 1:
            node[step] = laid(there, value)
        elif isinstance(steps[place + 1], int):
            node[step] = copy.deepcopy(default(walked)) if there is None else there
        elif not isinstance(there, dict):
            node[step] = {}
        node = node[step]


def merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on `under`, section by section."""
    return under | {name: laid(under.get(name), value) for name, value in over.items()}


def laid(there: Any, value: Any) -> Any:
    """`value` over what is there: two sections are merged; an empty one, {}, takes the other's place."""
    is_merged = bool(value) and isinstance(value, dict) and isinstance(there, dict)
    return merged(there, value) if is_merged else value


def filled(tree: dict[str, Any], default: Callable[[str], Any]) -> dict[str, Any]:
    """`tree` with every `${key}` replaced by what the recipe says there; what names no key stays.

    default: the value of a key that is left out, None where there is no such key. Raises InputError for a circle.
    """

    def value_at(path: str, above: tuple[str, ...]) -> Any:
        if path == STANDARD_LIBRARY:
            return sysconfig.get_paths()["stdlib"]
        if path in above:
            raise InputError(path, None, "refers to itself", "write its value out")
        node: Any = tree
        for name in path.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        return default(path) if node is None else fill(node, (*above, path))

    def fill(node: Any, above: tuple[str, ...]) -> Any:
        if isinstance(node, dict):
            return {name: fill(value, above) for name, value in node.items()}
        if isinstance(node, list):
            return [fill(value, above) for value in node]
        if not isinstance(node, str) or "${" not in node:
            return node
        if whole := _REFERENCE.fullmatch(node):
            return node if (value := value_at(whole[1], above)) is None else value

        def text_of(match: re.Match[str]) -> str:
            value = value_at(match[1], above)
            return match[0] if value is None or isinstance(value, dict | list) else str(value)

        return type(node)(_REFERENCE.sub(text_of, node))

    return fill(tree, ())  # type: ignore[no-any-return]


def read(kind: Any, given: Any, path: str, unknown: Unknown) -> Any:
    """The value of type `kind` that `given`, as loaded, means at the key `path`.

    unknown: the error for a path that is no key, its value, and the keys beside it. Raises InputError for a value that
    is not allowed.
    """
    options = options_of(kind)
    is_null = given is None or (isinstance(given, Plain) and given in NULLS)
    is_home = given == "~" and any(map(is_path, options))
    if is_null and not is_home and type(None) in options:
        return None
    if isinstance(given, dict):
        if (section := section_of(kind)) is not None:
            return _section(section, given, path, unknown)
        for option in options:
            if typing.get_origin(option) is dict:
                inner = typing.get_args(option)[1]
                return {name: read(inner, value, f"{path}.{name}", unknown) for name, value in given.items()}
    elif isinstance(given, list):
        for option in options:
            if typing.get_origin(option) is list:
                inner = typing.get_args(option)[0]
                return [read(inner, value, f"{path}[{place}]", unknown) for place, value in enumerate(given)]
    elif isinstance(given, str):
        for option in options:
            try:
                return _scalar(option, given, path)
            except ValueError as error:
                if isinstance(error, InputError):
                    raise
    elif section_of(kind) is None and given is not None:
        return given  # a number, as a default that was referred to; its section checks it
    if kind is Any:
        return untyped(given)
    raise InputError(path, given, f"must be {type_words(kind)}", _count_help(options, given))


def _section(kind: Any, given: dict[str, Any], path: str, unknown: Unknown) -> Any:
    entries = {entry.name: entry for entry in kind.__dataclass_fields__.values()}
    values = {}
    for name, value in given.items():
        inner = f"{path}.{name}".lstrip(".")
        if name not in entries:
            raise unknown(inner, value, [f"{path}.{each}".lstrip(".") for each in entries])
        values[name] = read(entries[name].type, value, inner, unknown)
    return section_at(path, kind, values)


def _scalar(kind: Any, text: str, path: str) -> Any:
    """Raises ValueError where the type has no such text; InputError where that is all there is to say."""
    plain = plain_type(kind)
    if plain is bool:
        if text not in BOOLEANS:
            raise ValueError
        return BOOLEANS[text]
    if plain is int:
        return whole_number(text)
    if plain is float:
        return float(text)
    if plain is str and is_path(kind):
        return expanded(str(text), path)
    if plain is str and (choices_of(kind) or not (isinstance(text, Plain) and text in NULLS)):
        if (left := _REFERENCE.search(text)) is not None:
            raise InputError(path, str(text), f"refers to {left[1]}, which is not a key of a recipe")
        return str(text)
    raise ValueError


def whole_number(text: str) -> int:
    """Of a count as people write it: 94B, 2e9, 1_000. Raises ValueError for a fraction and for what is none."""
    match = _COUNT.fullmatch(text.strip())
    if match is None or match[2] not in SUFFIXES:
        raise ValueError(text)
    try:
        number = Decimal(match[1].replace("_", "")) * SUFFIXES[match[2]]
    except ArithmeticError as error:
        raise ValueError(text) from error
    if number.adjusted() > MOST_DIGITS or number != number.to_integral_value():
        raise ValueError(text)
    return int(number)


def _count_help(options: tuple[Any, ...], given: Any) -> str:
    if int not in map(plain_type, options) or not isinstance(given, str) or not given[:1].isdigit():
        return ""
    return "write it as 8, 1_000, 128k, 1.5M, 94B, 80Gi or 2e9"


def expanded(text: str, path: str) -> str:
    """A path without `~` and variables. Raises InputError for a variable that is not set, or may be a secret."""

    def value_of(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if _SECRET.search(name):
            rule = f"names {name}, which may be a secret, and what a path is stands in logs and saved recipes"
            raise InputError(path, text, rule, "write the path out, or set another variable")
        if name not in os.environ:
            rule = f"names {name}, which is neither a key of the recipe nor an environment variable"
            raise InputError(path, text, rule, "set the variable, or write the path out")
        return os.environ[name]

    return _VARIABLE.sub(value_of, _HOME.sub(lambda match: os.path.expanduser(match[0]), text))


def untyped(given: Any) -> Any:
    """What YAML 1.2 takes a text for where a key has no type of its own."""
    if isinstance(given, dict):
        return {str(name): untyped(value) for name, value in given.items()}
    if isinstance(given, list):
        return [untyped(value) for value in given]
    if not isinstance(given, Plain):
        return given
    if given in NULLS:
        return None
    for meaning in (BOOLEANS.__getitem__, int, float):
        try:
            return meaning(given)
        except (KeyError, ValueError):
            continue
    return str(given)
