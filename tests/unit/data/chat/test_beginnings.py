"""Beginnings of texts have the ids that each has alone; the answers found with them are those of whole comparisons."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, trainers

from minitron_mcore.data.chat.beginnings import Beginnings, dividers
from minitron_mcore.data.chat.forms import Chat, RecordError
from minitron_mcore.data.chat.template import ChatTemplate, Encoder, find_template
from minitron_mcore.data.templating import transformers_tokenizer
from minitron_mcore.data.tokenizer import Tokenizer, load_tokenizer
from tests.unit.data.test_tokenizer_json import model
from tests.unit.text_data import JSON_PACKAGE, python_files

FAMILIES = ("chatml", "llama-3.1", "nemotron", "zephyr")
KINDS = (*FAMILIES, "sentencepiece", "unigram", "flags", "metaspace")
# Pieces of texts: marks, what marks begin with, words that merge with what stands beside them, white space, and what a
# normalizer changes.
PIECES = (
    *("<|im_start|>", "<|im_end|>", "<|im_", "<|eot_id|>", "<s>", "</s>", "<extra_id_1>", "<a>", "<a>b", "<l>", "<r>"),
    *(
        "<w>",
        "<n>",
        "<N>",
        "  ",
        " ",
        "\n",
        "\t",
        "def",
        "self",
        ".",
        "return",
        "b",
        "größer",
        "e\u0301",
        "🙂",
        "＜s＞",
        "ﬁ",
    ),
)
TEMPLATES = {
    # What opens an answer is no mark, and ends with white space that may merge with what follows.
    "words": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    "tight": "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}",
    "forgetful": "{% for m in messages %}{{ eos_token }}{{ m.role }}{% if loop.last %} now{% endif %}\n{{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ eos_token }}assistant now\n{% endif %}",
}
# On a machine that is busy, a tokenizer may take its time.
UNHURRIED = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def kind(
    family: Callable[[str], Tokenizer], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Any]:
    """transformers' tokenizer of each of KINDS."""

    @cache
    def make(name: str) -> Any:
        folder = tmp_path_factory.mktemp(name)
        if name in FAMILIES:
            return transformers_tokenizer(family(name))
        if name in ("sentencepiece", "unigram"):
            path = model(folder / "x.model", model_type="unigram", character_coverage=1.0)
            found = transformers_tokenizer(tokenizer if name == "sentencepiece" else load_tokenizer(str(path)))
            found.split_special_tokens = False  # as with a template that is given
            return found
        return awkward(folder, with_flags=name == "flags")

    return make


def awkward(folder: Path, with_flags: bool) -> Any:
    """Marks with flags, one that begins as another does, and a normalizer that changes what looks like marks; or spaces
    as SentencePiece has them, with one before the first word alone."""
    from transformers import PreTrainedTokenizerFast

    fast = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    if with_flags:
        fast.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    else:
        fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    alphabet = [chr(number) for number in range(32, 127)]
    trainer = trainers.BpeTrainer(
        show_progress=False, vocab_size=450, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet
    )
    fast.train_from_iterator([path.read_text(encoding="utf-8") for path in python_files(JSON_PACKAGE)], trainer)
    flags = {
        "<l>": {"lstrip": True},
        "<r>": {"rstrip": True},
        "<w>": {"single_word": True},
        "<n>": {"normalized": True},
    }
    fast.add_tokens(
        [AddedToken(name, **{"normalized": False, **flags.get(name, {})}) for name in ("<a>", "<a>b", "  ", *flags)]
    )
    fast.save(str(folder / "tokenizer.json"))
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>")


def ids_of(hf: Any, text: str) -> list[int]:
    return list(hf(text, add_special_tokens=False)["input_ids"])


texts = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)


@pytest.mark.parametrize("name", KINDS)
def test_a_beginning_has_the_ids_that_it_has_alone(name: str, kind: Callable[[str], Any]) -> None:
    """Wherever it ends, within marks and words too; other texts as well."""
    hf = kind(name)
    marks = dividers(hf)
    assert marks and not {"<l>", "<r>", "<w>", "<n>", "  "} & {*marks.values()}

    @UNHURRIED
    @given(texts, texts, st.integers(0, 200))
    @example("<a>b", "<a>", 3)
    @example("def</s>b", "b.b</s>b", 0)
    @example("a</s>  <r>\n\nb", "", 9)
    def check(text: str, other: str, length: int) -> None:
        whole = Beginnings(hf, text, marks)
        assert whole.ids == ids_of(hf, text)
        for beginning in (text[:length], text[: length // 4], other, text[: length // 8] + other):
            ids = ids_of(hf, beginning)
            assert whole.count(beginning) == (len(ids) if whole.ids[: len(ids)] == ids else None)

    check()


def test_names_that_are_cut_up_divide_nothing(kind: Callable[[str], Any]) -> None:
    hf = kind("zephyr")
    hf.split_special_tokens = True
    try:
        assert dividers(hf) == {}
        text = "a</s>b"
        assert Beginnings(hf, text, {}).ids == ids_of(hf, text)
        assert Beginnings(hf, text, {}).count("a</s>") in (None, len(ids_of(hf, "a</s>")))
    finally:
        hf.split_special_tokens = False


class Compared(Encoder):
    """What is learnt by whole comparisons alone: every beginning is turned into ids anew."""

    def _by_prefixes(self, chat: Chat, wanted: list[int], whole: Beginnings) -> list[bool]:
        ids = ids_of(self.hf, whole.text)
        learnt = [False] * len(ids)
        for place in wanted:
            before = ids_of(self.hf, self._render(chat, place, is_opened=True)[0])
            to_here = ids_of(self.hf, self._render(chat, place + 1)[0])
            if ids[: len(before)] != before or ids[: len(to_here)] != to_here or len(before) >= len(to_here):
                raise RecordError(f"has an answer, message {place + 1}")
            marks = [at for at in range(len(before), len(to_here)) if ids[at] in self.marks]
            end = len(to_here)
            if marks and not self.hf.decode(ids[marks[-1] + 1 : end]).strip():
                end = marks[-1] + 1
            learnt[len(before) : end] = [True] * (end - len(before))
        return learnt


@pytest.mark.parametrize("form", [*TEMPLATES, "its own"])
@pytest.mark.parametrize("name", [*FAMILIES, "sentencepiece"])
def test_the_answers_found_are_those_of_whole_comparisons(
    name: str, form: str, family: Callable[[str], Tokenizer], tokenizer: Tokenizer
) -> None:
    """Masks and refusals, over chats of any turns and words; with the family's own template, its marks taken away."""
    its = tokenizer if name == "sentencepiece" else family(name)
    text = TEMPLATES.get(form, "")
    if not text:
        own = find_template("zephyr" if name == "sentencepiece" else name, its)
        assert own is not None
        text = re.sub(r"\{%-? *(end)?generation *-?%\}", "", own.text)
    template = ChatTemplate(text, "it")
    ways = [(Encoder(its, template, last=last), Compared(its, template, last=last)) for last in (False, True)]

    @UNHURRIED
    @given(st.lists(texts.filter(str.strip), min_size=1, max_size=4), st.integers(0, 1))
    def check(said: list[str], last: int) -> None:
        said = said * 2 if len(said) % 2 else said
        chat = Chat(tuple({"role": ("user", "assistant")[at % 2], "content": each} for at, each in enumerate(said)))
        found: list[Any] = []
        for encode in ways[last]:
            try:
                ids, learnt = encode(chat)
                found.append((ids.tolist(), learnt.tolist()))
            except RecordError as error:
                found.append(error.rule.split(", that cannot")[0])
        assert found[0] == found[1]

    check()
