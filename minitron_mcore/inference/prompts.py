"""Prompts: read from a file, put into a tokenizer's chat template, as token ids; which ids end what follows. Pure.

A prompt is the ids that transformers' tokenizer gives for its text, marks included. Messages are rendered by the
tokenizer's own template, with what opens an answer, and the text's own marks are all there are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shown
from typing import Any

from minitron_mcore.checkpoint.companions import end_tokens
from minitron_mcore.data.templating import templating
from minitron_mcore.data.text_file import JSON_ENDINGS
from minitron_mcore.data.tokenizer import SENTENCEPIECE, Tokenizer
from minitron_mcore.errors import InputError
from minitron_mcore.files import first_line, reading
from minitron_mcore.inference.config import GenerateConfig

Message = dict[str, str]
FORM = '{"prompt": text} or {"messages": [{"role": "user", "content": text}]}'


@dataclass(frozen=True)
class Prompt:
    """A text, or a chat's messages. where: where it was given, in words."""

    where: str
    text: str = ""
    messages: tuple[Message, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {"messages": list(self.messages)} if self.messages else {"prompt": self.text}


def read_prompts(config: GenerateConfig, given: Sequence[str] = ()) -> tuple[Prompt, ...]:
    """`generate.prompt`, or those of the file `generate.prompts`. given: in place of both, those of `run.prompts`.
    Raises InputError, with file and line."""
    if given:
        prompts = [Prompt(f"run.prompts={shown(text)}", text) for text in given]
    elif config.prompts is None:
        if config.prompt is None:
            raise InputError(
                "generate.prompts", None, "is not given", "name a file of prompts, or give generate.prompt"
            )
        prompts = [Prompt(f"generate.prompt={shown(config.prompt)}", config.prompt)]
    else:
        prompts = list(_of_file(Path(config.prompts)))
        if not prompts:
            raise InputError(
                "generate.prompts", config.prompts, "holds no prompt", f"write lines of text, or of {FORM}"
            )
    if not config.chat:
        return tuple(prompts)
    return tuple(
        each if each.messages else Prompt(each.where, messages=({"role": "user", "content": each.text},))
        for each in prompts
    )


def _of_file(path: Path) -> Iterator[Prompt]:
    called = f"generate.prompts={path}"
    with reading(called):
        content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError("generate.prompts", path, f"is not UTF-8 (byte {error.start})", "write it as UTF-8") from error
    is_json = path.suffix.lower() in JSON_ENDINGS
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{called}, line {number}"
        if line.strip():
            yield _of_json(line, where) if is_json else Prompt(where, line.rstrip("\r"))


def _of_json(line: str, where: str) -> Prompt:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError("", where, f"is not JSON ({error})", f"write {FORM}") from error
    if isinstance(fields, dict) and len(fields.keys() & {"prompt", "messages"}) == 1:
        text, messages = fields.get("prompt"), fields.get("messages")
        if isinstance(text, str):
            return Prompt(where, text)
        if isinstance(messages, list) and messages and all(map(_is_message, messages)):
            return Prompt(where, messages=tuple(messages))
    raise InputError("", where, "is not a prompt", f"write {FORM}")


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))


def prompt_ids(prompts: Sequence[Prompt], tokenizer: Tokenizer, limit: int, model: str) -> tuple[tuple[int, ...], ...]:
    """The token ids of each prompt. limit: max_position_embeddings of `model`, its name in words.

    Raises InputError for messages without a template, and for a prompt after which there is no room for a token.
    """
    found = []
    for prompt in prompts:
        if prompt.messages:
            ids = _chat_ids(render(prompt, tokenizer), tokenizer)
        else:
            ids = tokenizer.tokenize_prompt(prompt.text)
        if len(ids) >= limit:
            rule = f"has {len(ids)} tokens, and {model} takes max_position_embeddings={limit}, of which one must be new"
            raise InputError("", prompt.where, rule, "shorten it")
        found.append(tuple(ids))
    return tuple(found)


def _chat_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Of what a template has written: its marks are those of the tokenizer, though a SentencePiece model knows none."""
    if tokenizer.type != SENTENCEPIECE:
        return tokenizer.tokenize(text)
    return list(templating(tokenizer).encode(text, add_special_tokens=False))


def render(prompt: Prompt, tokenizer: Tokenizer) -> str:
    """A chat's messages as the tokenizer's template writes them, and what opens the answer. Raises InputError."""
    template = templating(tokenizer)
    if template is None:
        rule = f"is a chat, and the tokenizer in {tokenizer.path} has no chat template"
        raise InputError("", prompt.where, rule, "give plain prompts, or put chat_template.jinja beside the tokenizer")
    try:
        return str(template.apply_chat_template(list(prompt.messages), tokenize=False, add_generation_prompt=True))
    except Exception as error:  # whatever the template raises
        rule = f"does not suit the chat template of the tokenizer in {tokenizer.path} ({first_line(error)})"
        raise InputError("", prompt.where, rule, "change its messages") from error


def stop_ids(tokenizer: Tokenizer, checkpoint: Path) -> frozenset[int]:
    """The tokenizer's end of document, and the ids at which the model that `checkpoint` descends from stops, as
    generation_config.json or config.json says."""
    return frozenset({tokenizer.eod, *end_tokens(checkpoint, tokenizer.eod)})


class Continuation:
    """New tokens as text, and whether a text that ends them is there.

    A token's own text may depend on its place: SentencePiece takes a space off the beginning. So the tokens are read
    behind others, whose text is taken off again. A stop text may begin and end within tokens.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._before = tokenizer.tokenize("x")
        self._begins = tokenizer.detokenize(self._before)
        # Tokens of which only the last can hold a stop text that was not there one token ago: a byte each, or more.
        self._recent = max((len(text.encode()) for text in stop), default=0) + 4

    def text(self, new: Sequence[int]) -> str:
        """All that the tokens say; rows of a model's vocabulary that its tokenizer lacks say nothing."""
        known = [token for token in new if token < self._tokenizer.vocab_size]
        return self._tokenizer.detokenize([*self._before, *known]).removeprefix(self._begins)

    def is_stopped(self, new: Sequence[int]) -> bool:
        """Whether a stop text is within the last of the tokens."""
        recent = self.text(new[-self._recent :])
        return any(text in recent for text in self._stop)

    def cut(self, new: Sequence[int]) -> str:
        """What the tokens say before the first stop text."""
        text = self.text(new)
        return text[: min((place for stop in self._stop if (place := text.find(stop)) >= 0), default=len(text))]
