"""One object of a file -> a chat, a completion or a preference: the forms that are read, and the rules they keep. Pure.

    messages        [{"role", "content"}, …], tools         a chat
    conversations   [{"from", "value"}, …], system, tools   a chat, as ShareGPT has it
    prompt          completion                              texts, or messages
    input           output                                  the same
    instruction     output; input or none                   texts, as Alpaca has it
    prompt          chosen, rejected                        a preference, of texts or messages; the prompt may be left
                                                            out where both answers begin with it

`chosen_response` and `rejected_response` are `chosen` and `rejected`; rewards are `chosen_reward` and
`rejected_reward`, or `score_chosen` and `score_rejected`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional, Union

Message = dict[str, Any]

# What other collections call a role, in small letters or not.
ROLES = {name: name for name in ("system", "developer", "user", "assistant", "tool")}
ROLES |= {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
}
ROLES |= {"model": "assistant", "observation": "tool", "function_response": "tool", "function": "tool"}
OPENERS = ("system", "developer")
# Who may speak after whom; None: at the beginning, or after the opening instructions alone.
NEXT = {None: ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("tool", "assistant")}

CHATS = "messages, conversations, prompt and completion, input and output, or instruction and output"
SAME = "has the same answer as chosen and as rejected"
PAIRS = "chosen and rejected, with or without prompt"
TEXTS = (("prompt", "completion"), ("input", "output"))
ALIASES = {
    "chosen": ("chosen", "chosen_response"),
    "rejected": ("rejected", "rejected_response"),
    "chosen_reward": ("chosen_reward", "score_chosen"),
    "rejected_reward": ("rejected_reward", "score_rejected"),
}


class RecordError(Exception):
    """What is wrong with a record, as a rule that goes on after its place, and what to do about it."""

    def __init__(self, rule: str, remedy: str = "mend it or leave it out") -> None:
        super().__init__(rule, remedy)
        self.rule, self.remedy = rule, remedy


@dataclass(frozen=True)
class Chat:
    """messages: of keys role and content, and whatever else a template reads. tools: as JSON schemas.

    first: the assistant's messages from this one on are learnt; those before are given.
    """

    messages: tuple[Message, ...]
    tools: Optional[tuple[Any, ...]] = None
    first: int = 0


@dataclass(frozen=True)
class Completion:
    """A text, and what it goes on with, which alone is learnt."""

    prompt: str
    text: str


Sample = Union[Chat, Completion]


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt. rewards: of the chosen and of the rejected one."""

    chosen: Sample
    rejected: Sample
    rewards: Optional[tuple[float, float]] = None


def parse_sample(fields: Mapping[str, Any], *, turns: bool = False) -> Sample:
    """A chat or completion. turns: texts become a user's and an assistant's turn. Raises RecordError."""
    for key in ("messages", "conversations"):
        if fields.get(key) is not None:
            messages = _messages(fields[key], key)
            if isinstance(system := fields.get("system"), str) and system and messages[0]["role"] not in OPENERS:
                messages = [{"role": "system", "content": system}, *messages]
            return _chat(messages, _tools(fields))
    if fields.get("instruction") is not None and fields.get("output") is not None:
        return _continued(_instruction(fields), fields["output"], ("instruction", "output"), _tools(fields), turns)
    for before, after in TEXTS:
        if fields.get(before) is not None and fields.get(after) is not None:
            if fields.get("label") is False:  # a collection of good and bad answers, as for KTO
                raise RecordError("has an answer with label=false, one that is not to be learnt", "leave it out")
            return _continued(fields[before], fields[after], (before, after), _tools(fields), turns)
    remedy = "rename its keys or leave it out"
    if _value(fields, "chosen") is not None:
        remedy = "preferences need a method that reads them, as align.method=dpo"
    raise RecordError(f"has {_only(fields)}, not {CHATS}", remedy)


def parse_pair(fields: Mapping[str, Any], *, turns: bool = False, needs_rewards: bool = False) -> Pair:
    """A preference. turns: texts become a user's and an assistant's turn. Raises RecordError."""
    values = {key: _value(fields, key) for key in ALIASES}
    if missing := [key for key in ("chosen", "rejected") if values[key] is None]:
        rule = f"has no {' and no '.join(missing)}, only {_names(fields)}"
        raise RecordError(rule, f"preferences have {PAIRS}")
    rewards = _rewards(values["chosen_reward"], values["rejected_reward"], needs_rewards)
    prompt, tools = fields.get("prompt"), _tools(fields)
    answers = values["chosen"], values["rejected"]
    if answers[0] == answers[1]:
        raise RecordError(SAME)
    if all(isinstance(answer, str) for answer in answers):
        given, *texts = _texts(prompt, *answers)
        named = zip(("chosen", "rejected"), texts, strict=True)
        sides = [_continued(given, text, ("prompt", name), tools, turns) for name, text in named]
    else:
        sides = _message_sides(prompt, *answers, tools)
    return Pair(sides[0], sides[1], rewards)


def _instruction(fields: Mapping[str, Any]) -> str:
    """What is asked for, and behind a blank line what it is about, if anything."""
    for key in ("instruction", "input"):
        if not isinstance(fields.get(key) or "", str):
            raise RecordError(f"has {_kind(fields[key])} as {key}, not a text")
    return "\n\n".join(fields[key] for key in ("instruction", "input") if fields.get(key))


def _continued(before: Any, after: Any, keys: tuple[str, str], tools: Any, turns: bool) -> Sample:
    """What was given as a prompt and what goes on from it, each a text or messages."""
    if isinstance(before, str) and isinstance(after, str):
        if not after.strip():
            raise RecordError(f"has an empty answer, {keys[1]}")
        if not turns:
            return Completion(before, after)
    given = [_turn("user", before)] if isinstance(before, str) else _messages(before, keys[0])
    answer = [_turn("assistant", after)] if isinstance(after, str) else _messages(after, keys[1])
    return _chat([*given, *answer], tools, first=len(given))


def _texts(prompt: Any, chosen: str, rejected: str) -> tuple[Any, str, str]:
    """(prompt, both answers without it). Without a prompt, it is the words that both begin with."""
    if prompt is not None:
        is_repeated = isinstance(prompt, str) and prompt and chosen.startswith(prompt) and rejected.startswith(prompt)
        return (prompt, chosen[len(prompt) :], rejected[len(prompt) :]) if is_repeated else (prompt, chosen, rejected)
    shared = os.path.commonprefix([chosen, rejected])  # noqa: RUF071  # of texts, not of paths
    if shared.split() and not shared[-1].isspace():  # it may end within a word
        shared = shared[: -len(shared.split()[-1])]
    shared = shared.rstrip(" ")  # which tokenizers put before the next word
    if not shared.strip():
        raise RecordError("has no prompt, and its answers begin with different words", "give each its prompt")
    return shared, chosen[len(shared) :], rejected[len(shared) :]


def _message_sides(prompt: Any, chosen: Any, rejected: Any, tools: Any) -> list[Sample]:
    """Both sides as chats. The prompt is given, or is what both sides begin with, or both."""
    sides = [
        [_turn("assistant", answer)] if isinstance(answer, str) else _messages(answer, key)
        for key, answer in (("chosen", chosen), ("rejected", rejected))
    ]
    shared = 0
    while shared < min(map(len, sides)) and sides[0][shared] == sides[1][shared]:
        shared += 1
    if len(sides[0]) == len(sides[1]) == shared:
        raise RecordError(SAME)
    given = sides[0][:shared]
    if prompt is not None and not (isinstance(prompt, str) and _is_said(prompt, given)):
        stated = [_turn("user", prompt)] if isinstance(prompt, str) else _messages(prompt, "prompt")
        if given[: len(stated)] != stated:
            if any(side[0]["role"] != "assistant" for side in sides):
                rule = "has a prompt that is not what its chosen and rejected messages begin with"
                raise RecordError(rule, "leave the prompt out, or out of the messages")
            sides = [[*stated, *side] for side in sides]
            shared += len(stated)
    elif not given:
        raise RecordError("has no prompt, and its answers begin with different messages", "give each its prompt")
    return [_chat(side, tools, first=shared) for side in sides]


def _is_said(text: str, messages: Sequence[Message]) -> bool:
    """Whether a prompt given as text is one of the user's messages, as in collections that have both."""
    return any(each["role"] == "user" and each["content"].strip() == text.strip() for each in messages)


def _chat(messages: Sequence[Message], tools: Any, first: int = 0) -> Chat:
    """Raises RecordError unless the roles take turns and the assistant has something to say, last."""
    before: Optional[str] = None
    for place, message in enumerate(messages):
        role = message["role"]
        if role in OPENERS and before is None:
            continue
        if role not in NEXT[before]:
            after = f"after {_of(before)}" if before else "at the beginning"
            rule = f"has roles out of turn: message {place + 1} is {_of(role)}, {after}"
            raise RecordError(rule, f"{' or '.join(map(_of, NEXT[before]))} must stand there, or leave it out")
        if role == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
            raise RecordError(f"has an empty answer: message {place + 1}, the assistant's")
        before = role
    if before != "assistant":
        said = f"ends with {_of(before)}" if before else "has no message of a user"
        raise RecordError(f"{said}, so that nothing is answered", "end it with the assistant's")
    return Chat(tuple(messages), tools, first)


def _of(role: Optional[str]) -> str:
    return f"the {role}'s"


def _turn(role: str, text: str) -> Message:
    return {"role": role, "content": text}


def _messages(value: Any, key: str) -> list[Message]:
    """Messages by the names that templates know. Raises RecordError."""
    value = [value] if isinstance(value, Mapping) else value
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        kind = "an empty list" if value == [] else _kind(value)
        raise RecordError(f"has in {key} {kind}, not messages")
    return [_message(each, f"message {place} of {key}") for place, each in enumerate(value, start=1)]


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise RecordError(f"has as {where} {_kind(value)}, not a message")
    rest = {name: each for name, each in value.items() if each is not None}
    role = rest.pop("role", None) or rest.pop("from", None)
    if not isinstance(role, str):
        raise RecordError(
            f"has no role in {where}, only {_names(rest)}", "messages have role and content, or from and value"
        )
    if role.lower() not in ROLES:
        raise RecordError(f"has the unknown role {role!r} in {where}", f"roles are {', '.join(ROLES)}")
    name = "content" if "content" in rest else "value"
    content, calls = rest.pop(name, None), rest.get("tool_calls")
    if content is None and not calls:
        raise RecordError(f"has no content in {where}, only {_names(value)}")
    message = {"role": ROLES[role.lower()], "content": _text(content, where), **rest}
    if calls:
        message["tool_calls"] = [_call(each) for each in calls] if isinstance(calls, list) else calls
    return message


def _text(content: Any, where: str) -> str:
    """A message's text, which may come in parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = f"of type {part.get('type')}" if isinstance(part, Mapping) else f"that is {_kind(part)}"
            raise RecordError(f"has content {kind}, not text, in {where}")
    return "".join(part["text"] for part in parts)


def _call(value: Any) -> Any:
    """A tool call whose arguments are an object, as templates take them; many files have them as JSON in a string."""
    if not isinstance(value, Mapping):
        return value
    call = {name: each for name, each in value.items() if each is not None}
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call(call["function"])}
    if isinstance(arguments := call.get("arguments"), str):
        try:
            call["arguments"] = json.loads(arguments)
        except ValueError:
            pass  # the template has it as it is
    return call


def _tools(fields: Mapping[str, Any]) -> Optional[tuple[Any, ...]]:
    tools = fields.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise RecordError(f"has tools that are not JSON ({error})") from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RecordError("has tools that are not a list of JSON schemas")
    return tuple(tools)


def _rewards(chosen: Any, rejected: Any, needed: bool) -> Optional[tuple[float, float]]:
    missing = [name for name, value in (("chosen_reward", chosen), ("rejected_reward", rejected)) if value is None]
    if len(missing) == 2 and not needed:
        return None
    if missing:
        raise RecordError(
            f"has no {' and no '.join(missing)}", "give both rewards" if needed else "give both, or neither"
        )
    for name, value in (("chosen_reward", chosen), ("rejected_reward", rejected)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise RecordError(f"has {value!r} as {name}, not a finite number")
    return float(chosen), float(rejected)


def _value(fields: Mapping[str, Any], key: str) -> Any:
    return next((fields[name] for name in ALIASES[key] if fields.get(name) is not None), None)


def _names(fields: Mapping[str, Any]) -> str:
    return ", ".join(sorted(name for name, value in fields.items() if value is not None)) or "no keys"


def _only(fields: Mapping[str, Any]) -> str:
    names = _names(fields)
    return names if names == "no keys" else f"only {names}"


def _kind(value: Any) -> str:
    names = {"str": "a text", "dict": "an object", "list": "a list", "NoneType": "null", "bool": "true or false"}
    names |= {"int": "a number", "float": "a number"}
    return names.get(type(value).__name__, f"a {type(value).__name__}")
