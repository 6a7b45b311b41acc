"""A chat template: messages -> token ids, and which of them are learnt. Pure.

The ids are those of transformers' `apply_chat_template`: the template writes a text, marks and all, and the tokenizer
adds none of its own. Which tokens are the assistant's is said by the template's `{% generation %}` marks, or, where it
has none, found by comparison: the ids of the messages before an answer, with what opens one, and those with the answer
must both be what the whole chat begins with. Where neither gives an answer's place, the chat is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Optional

import numpy

from minitron_mcore.data.chat.beginnings import Beginnings, dividers
from minitron_mcore.data.chat.config import TEMPLATES
from minitron_mcore.data.chat.forms import Chat, Completion, Message, RecordError, Sample
from minitron_mcore.data.templating import templating, transformers_tokenizer
from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.data.tokenizer_files import TEMPLATE_FILES, files_of
from minitron_mcore.errors import InputError
from minitron_mcore.files import first_line, reading, write_whole
from minitron_mcore.runtime.libraries import imported

FILE = "chat_template.jinja"
KEY = "chat.template"
SETTINGS, SPLIT = "tokenizer_config.json", "split_special_tokens"  # whether the names of marks in a text are cut up
MARKED = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
ENDLESS = int(1e30)  # tokens: what is too long is nothing that transformers is to warn of

Ids = tuple[numpy.ndarray, numpy.ndarray]  # token ids int32 [n], and whether each is learnt, bool [n]
Span = tuple[int, int]  # characters [start, end)


@dataclass(frozen=True)
class ChatTemplate:
    """text: in Jinja. name: what messages call it. with_tools: another for chats with tools, where there is one.
    own: it lies beside the tokenizer already."""

    text: str
    name: str
    with_tools: str = ""
    own: bool = False

    @property
    def digest(self) -> str:
        """sha256 in hex."""
        return hashlib.sha256(f"{self.text}\0{self.with_tools}".encode()).hexdigest()

    def for_tools(self, tools: Any) -> str:
        return self.with_tools or self.text if tools else self.text

    def save(self, folder: str | Path) -> None:
        """Write it beside the tokenizer in `folder`, as transformers reads it there, in place of those that it had; the
        marks that it writes are the tokenizer's from then on. The tokenizer's own is there. One process calls."""
        if self.own:
            return
        for name in files_of(str(folder), TEMPLATE_FILES):
            os.remove(os.path.join(folder, name))
        write_whole(Path(folder) / FILE, self.text)
        settings = Path(folder) / SETTINGS
        if settings.is_file() and (content := json.loads(settings.read_text(encoding="utf-8"))).get(SPLIT):
            write_whole(settings, json.dumps({**content, SPLIT: False}, ensure_ascii=False, indent=1) + "\n")


def find_template(given: Optional[str], tokenizer: Tokenizer) -> Optional[ChatTemplate]:
    """The template that `chat.template` names, a file or one of TEMPLATES; of null the tokenizer's own, None where it
    has none. Raises InputError for one that is missing or is no template."""
    if given is None:
        return _own(tokenizer)
    if given in TEMPLATES and not Path(given).is_file():
        text = resources.files(__package__).joinpath(f"templates/{given}.jinja").read_text(encoding="utf-8")
    else:
        if not Path(given).is_file():
            remedy = f"name a Jinja file, or one of {', '.join(TEMPLATES)}"
            raise InputError(KEY, given, "is not a file", remedy)
        with reading(f"{KEY}={given}"):
            content = Path(given).read_bytes()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(KEY, given, f"is not UTF-8 (byte {error.start})", "write it as UTF-8") from error
    template = ChatTemplate(text, f"{KEY}={given}")
    _check(template, given)
    return template


def _own(tokenizer: Tokenizer) -> Optional[ChatTemplate]:
    loaded = templating(tokenizer)
    if loaded is None:
        return None
    given: tuple[Any, ...] = (None, [{}])
    try:
        text, with_tools = (str(loaded.get_chat_template(tools=tools)) for tools in given)
    except ValueError as error:
        rule = f"is not given, and the tokenizer in {tokenizer.path} has several, none of them called default"
        raise InputError(KEY, None, rule, "name the file of one") from error
    name = f"the chat template of the tokenizer in {tokenizer.path}"
    return ChatTemplate(text, name, "" if with_tools == text else with_tools, own=True)


def _check(template: ChatTemplate, given: str) -> None:
    """Raise InputError for what Jinja cannot read."""
    from jinja2 import TemplateSyntaxError

    try:
        _render(template.text, [{"role": "user", "content": "a"}], None, {}, is_opened=False)
    except TemplateSyntaxError as error:
        rule = f"is not a Jinja template: {first_line(error)}, in line {error.lineno}"
        raise InputError(KEY, given, rule, "mend it, or name another") from error
    except Exception:  # it may want other messages, or marks that the tokenizer has
        pass


class Encoder:
    """Chats and completions as ids. last: of a chat the last answer alone is learnt, not all of them."""

    def __init__(self, tokenizer: Tokenizer, template: Optional[ChatTemplate], *, last: bool = False) -> None:
        self.tokenizer, self.template, self.last = tokenizer, template, last
        self.hf = transformers_tokenizer(tokenizer)
        self.hf.model_max_length = ENDLESS
        if template is not None and not template.own:
            # Also of a tokenizer that cuts the names of its marks up, those that a template writes are the marks.
            self.hf.split_special_tokens = False
        self.dividers = dividers(self.hf)
        self.names = self.hf.special_tokens_map
        self.written: set[str] = set()  # of tools and calls, what the template has been seen to write
        self.marks = tokenizer.added | frozenset(self.hf.all_special_ids)
        plain, marked = self._encode("x"), list(self.hf("x")["input_ids"])
        # What the tokenizer puts before every text.
        self.opening = marked[:1] if marked[1:][: len(plain)] == plain and marked[:1] == [tokenizer.bos] else []

    def __call__(self, sample: Sample) -> Ids:
        """Raises RecordError where the template does not suit the sample, InputError where there is none."""
        ids, learnt = self._chat(sample) if isinstance(sample, Chat) else self._completion(sample)
        if len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos:
            ids, learnt = ids[1:], learnt[1:]
        rows = self.tokenizer.rows
        if rows is not None and ids and (largest := max(ids)) >= rows:
            raise RecordError(f"holds {self.tokenizer.beyond(largest)}")
        return numpy.array(ids, dtype=numpy.int32), numpy.array(learnt, dtype=bool)

    def _completion(self, sample: Completion) -> tuple[list[int], list[bool]]:
        """As it is, behind the tokenizer's own mark and up to the end of sentence. The prompt's tokens are those that a
        model is given to go on from, so none is of the prompt and of the answer."""
        before, ids = self._encode(sample.prompt), self._encode(sample.prompt + sample.text)
        if ids[: len(before)] != before:
            ids = before + self._encode(sample.text)
        if ids[-1:] != [self.tokenizer.eos]:
            ids.append(self.tokenizer.eos)
        given = len(self.opening) + len(before)
        ids = [*self.opening, *ids]
        return ids, [place >= given for place in range(len(ids))]

    def _chat(self, chat: Chat) -> tuple[list[int], list[bool]]:
        answers = [place for place, message in enumerate(chat.messages) if message["role"] == "assistant"]
        wanted = [place for place in answers if place >= chat.first][-1 if self.last else 0 :]
        text, spans = self._render(chat, len(chat.messages))
        self._refuse_lost(chat, text)
        if spans is not None and self.hf.is_fast:
            ids, characters = self._encode_spans(text)
            learnt = _inside(characters, self._spans_of(chat, answers, wanted, text, spans))
        else:
            whole = Beginnings(self.hf, text, self.dividers)
            ids, learnt = whole.ids, self._by_prefixes(chat, wanted, whole)
        if not any(learnt):
            raise RecordError(f"has no token that is learnt, by {self._name}", "change its messages or the template")
        return ids, learnt

    def _refuse_lost(self, chat: Chat, text: str) -> None:
        """Raise RecordError where the template leaves the chat's tools or calls out, as one that has no form for them
        does without a word."""
        called = tuple({name: each[name] for name in each if name != "tool_calls"} for each in chat.messages)
        for what, without in (("tools", replace(chat, tools=None)), ("tool calls", replace(chat, messages=called))):
            if without == chat or what in self.written:
                continue
            try:
                is_lost = self._render(without, len(chat.messages))[0] == text
            except RecordError:  # it cannot do without them
                is_lost = False
            if is_lost:
                remedy = "use a template that has a form for them, or leave it out"
                raise RecordError(f"has {what}, which {self._name} leaves out", remedy)
            self.written.add(what)

    def _spans_of(self, chat: Chat, answers: list[int], wanted: list[int], text: str, spans: list[Span]) -> list[Span]:
        """Those of the template's spans that are of the answers `wanted`, the last ones."""
        if wanted == answers:
            return spans
        if len(spans) == len(answers):
            return spans[-len(wanted) :]
        before, _ = self._render(chat, wanted[0])
        if not text.startswith(before):
            rule = f"has {len(answers)} answers, for which {self._name} gives {len(spans)} spans"
            raise RecordError(rule, "use a template with one {% generation %} for each answer")
        return [span for span in spans if span[0] >= len(before)]

    def _by_prefixes(self, chat: Chat, wanted: list[int], whole: Beginnings) -> list[bool]:
        learnt = [False] * len(whole.ids)
        for place in wanted:
            start = whole.count(self._render(chat, place, is_opened=True)[0])
            is_last = place + 1 == len(chat.messages)
            end = len(whole.ids) if is_last else whole.count(self._render(chat, place + 1)[0])
            if start is None or end is None or start >= end:
                rule = (
                    f"has an answer, message {place + 1}, that cannot be told from the rest: {self._name} has no "
                    "{% generation %} marks, and the ids of the messages up to it are not what those of the whole chat "
                    "begin with"
                )
                raise RecordError(rule, "mark the assistant's words in the template")
            end = self._end(whole.ids, start, end)
            learnt[start:end] = [True] * (end - start)
        return learnt

    def _end(self, ids: list[int], start: int, end: int) -> int:
        """Where the answer ids[start:end] does: white space behind its last mark is the template's, not said by
        anyone."""
        last = next((place for place in reversed(range(start, end)) if ids[place] in self.marks), None)
        return end if last is None or self.hf.decode(ids[last + 1 : end]).strip() else last + 1

    @property
    def _name(self) -> str:
        assert self.template is not None
        return self.template.name

    def _render(self, chat: Chat, number: int, is_opened: bool = False) -> tuple[str, Optional[list[Span]]]:
        """The first `number` messages as text, and where the template's marks are; None: it has none.

        is_opened: with what opens an answer.
        """
        if self.template is None:
            rule = f"is not given, and the tokenizer in {self.tokenizer.path} has no chat template"
            raise InputError(KEY, None, rule, f"name a Jinja file, or one of {', '.join(TEMPLATES)}")
        text = self.template.for_tools(chat.tools)
        try:
            return _render(text, chat.messages[:number], chat.tools, self.names, is_opened)
        except Exception as error:  # whatever the template raises
            raise RecordError(f"does not suit {self._name} ({first_line(error)})", "change its messages") from error

    def _encode(self, text: str) -> list[int]:
        return list(self.hf(text, add_special_tokens=False)["input_ids"])

    def _encode_spans(self, text: str) -> tuple[list[int], list[Span]]:
        found = self.hf(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(found["input_ids"]), [(int(start), int(end)) for start, end in found["offset_mapping"]]


def _render(
    template: str, messages: Sequence[Message], tools: Any, names: dict[str, str], is_opened: bool
) -> tuple[str, Optional[list[Span]]]:
    render: Callable[..., Any] = imported("transformers.utils.chat_template_utils").render_jinja_template
    is_marked = MARKED.search(template) is not None
    texts, spans = render(
        conversations=[list(messages)],
        tools=None if tools is None else list(tools),
        chat_template=template,
        return_assistant_tokens_mask=is_marked,
        add_generation_prompt=is_opened,
        **names,
    )
    return texts[0], [(start, end) for start, end in spans[0]] if is_marked else None


def _inside(tokens: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """For each token, by its characters, whether it is in one of `spans`, though it may begin or end outside.

    White space may be left out of a token's characters: what is nothing but that has its end as both.
    """
    inside = [False] * len(tokens)
    for start, end in spans:
        if start == end:
            continue
        first = next((place for place, (_, stop) in enumerate(tokens) if stop > start), len(tokens))
        beyond = first
        while beyond < len(tokens) and (tokens[beyond][0] < end or tokens[beyond] == (end, end)):
            beyond += 1
        inside[first:beyond] = [True] * (beyond - first)
    return inside
