"""Templates: the texts that their models know, and ids and masks as transformers has them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

from minitron_mcore.data.agreement import check_saved
from minitron_mcore.data.chat.config import TEMPLATES
from minitron_mcore.data.chat.forms import Chat, Completion, RecordError
from minitron_mcore.data.chat.template import ChatTemplate, Encoder, find_template
from minitron_mcore.data.templating import transformers_tokenizer
from minitron_mcore.data.tokenizer import Tokenizer, load_tokenizer
from minitron_mcore.data.tokenizer_json import save_for_transformers
from tests.refusals import refuses

Family = Callable[[str], Tokenizer]


def turns(*texts: str, system: str | None = None) -> tuple[dict[str, Any], ...]:
    """A user's and the assistant's turns, by turns."""
    messages = [{"role": "system", "content": system}] if system else []
    return (*messages, *({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)))


CHATS = {
    "one": turns("Sort [3, 1].", "[1, 3]"),
    "several": turns("a = 1\n", "def f():\n    return 1", "and  then?", "größer 🙂", "x", "y \n"),
    "system": turns("Read it.", "import json", "More.", "json.load(file)", system="You are brief."),
    "empty instructions": ({"role": "system", "content": ""}, *turns("a", "b", "c", "d")),
    "an empty question": turns("", "a"),
    "white space behind": turns("a  \n", "b \n\n", "c", "d\t "),
    "signs": turns("größer 🙂 漢字", "日本 👩‍👩‍👧 é", "e\u0301", "\ufb01 ½"),
}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "a sum", "parameters": {"type": "object"}}}
WITH_TOOLS = (
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
)
# What the models' own templates make of one question with instructions and its answer, from their cards.
TEXTS = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n",
    "llama-3.1": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>"
    ),
    "mistral": "<s> [INST] S\n\nQ [/INST] A</s>",
    "nemotron": "<extra_id_0>System\nS\n\n<extra_id_1>User\nQ\n<extra_id_1>Assistant\nA\n<extra_id_1>",
    "qwen2.5": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n",
    "zephyr": "<|system|>\nS</s>\n<|user|>\nQ</s>\n<|assistant|>\nA</s>\n",
}


def template_of(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    found = find_template(name, tokenizer)
    assert found is not None
    return found


def unmarked(template: ChatTemplate) -> ChatTemplate:
    """The same without its marks."""
    return ChatTemplate(re.sub(r"\{%-? *(end)?generation *-?%\}", "", template.text), "the template")


def theirs(tokenizer: Tokenizer, template: ChatTemplate, messages: Any, tools: Any = None) -> Any:
    loaded = transformers_tokenizer(tokenizer)
    return loaded.apply_chat_template(
        list(messages), tools, chat_template=template.text, return_dict=True, return_assistant_tokens_mask=True
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_that_its_models_know(name: str, family: Family) -> None:
    tokenizer = family(name)
    template = template_of(name, tokenizer).text
    messages = list(turns("Q", "A", system="S"))
    apply = transformers_tokenizer(tokenizer).apply_chat_template
    assert apply(messages, chat_template=template, tokenize=False) == TEXTS[name]
    opened = apply(messages[:2], chat_template=template, tokenize=False, add_generation_prompt=True)
    assert TEXTS[name].startswith(opened) and TEXTS[name][len(opened) :].lstrip().startswith("A")


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_masks_are_those_of_transformers(name: str, chat: str, family: Family) -> None:
    tokenizer = family(name)
    template = template_of(name, tokenizer)
    ids, learnt = Encoder(tokenizer, template)(Chat(CHATS[chat]))
    expected = theirs(tokenizer, template, CHATS[chat])
    assert ids.tolist() == expected["input_ids"] and ids.dtype == numpy.int32
    assert learnt.tolist() == [bool(each) for each in expected["assistant_masks"]]
    assert tokenizer.bos is None or list(ids).count(tokenizer.bos) == (name in ("llama-3.1", "mistral"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_name_of_a_mark_in_what_is_said_is_the_mark(name: str, family: Family) -> None:
    """As to transformers. What is learnt is no other for it: that is told by characters, or by prefixes."""
    tokenizer = family(name)
    template, pieces = template_of(name, tokenizer), tokenizer.pieces()
    names = " ".join(pieces[mark] for mark in sorted(tokenizer.added))
    messages = turns(f"a {names} b", "json", f"{names}", f"def {names} f")
    ids, learnt = Encoder(tokenizer, template)(Chat(messages))
    expected = theirs(tokenizer, template, messages)
    assert (ids.tolist(), learnt.tolist()) == (expected["input_ids"], [bool(x) for x in expected["assistant_masks"]])
    plain, _ = Encoder(tokenizer, template)(Chat(turns("a b", "json", "x", "def f")))
    for mark in tokenizer.added:
        assert ids.tolist().count(mark) == plain.tolist().count(mark) + 3, pieces[mark]
    assert Encoder(tokenizer, unmarked(template))(Chat(messages))[1].tolist() == learnt.tolist()
    said, given = tokenizer.detokenize(ids[learnt]), tokenizer.detokenize(ids[~learnt])
    assert "json" in said and "def" in said and "json" not in given and "def" not in given


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_comparing_prefixes_gives_the_mask_of_the_marks(name: str, chat: str, family: Family) -> None:
    tokenizer = family(name)
    template = template_of(name, tokenizer)
    for last in (False, True):
        ids, learnt = Encoder(tokenizer, template, last=last)(Chat(CHATS[chat]))
        others, found = Encoder(tokenizer, unmarked(template), last=last)(Chat(CHATS[chat]))
        assert ids.tolist() == others.tolist()
        assert learnt.tolist() == found.tolist()


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_last_answer_and_what_is_given(name: str, family: Family) -> None:
    tokenizer = family(name)
    encode = Encoder(tokenizer, template_of(name, tokenizer))
    messages = CHATS["system"]
    ids, learnt = encode(Chat(messages))
    _, last = Encoder(tokenizer, encode.template, last=True)(Chat(messages))
    _, rest = encode(Chat(messages, first=3))
    answers = numpy.flatnonzero(numpy.diff(learnt.astype(int), prepend=0) == 1)
    assert len(answers) == 2 and last.tolist() == rest.tolist()
    assert last.tolist() == [bool(each) and place >= answers[1] for place, each in enumerate(learnt)]
    assert "json.load(file)" in tokenizer.detokenize(ids[last]) and "import" not in tokenizer.detokenize(ids[last])


@pytest.mark.parametrize("name", ["llama-3.1", "qwen2.5", "nemotron"])
def test_tools(name: str, family: Family) -> None:
    """A call is learnt as an answer is; what the tool gives back is not."""
    tokenizer = family(name)
    template = template_of(name, tokenizer)
    ids, learnt = Encoder(tokenizer, template)(Chat(WITH_TOOLS, (TOOL,)))
    expected = theirs(tokenizer, template, WITH_TOOLS, [TOOL])
    assert (ids.tolist(), learnt.tolist()) == (expected["input_ids"], [bool(x) for x in expected["assistant_masks"]])
    said, given = tokenizer.detokenize(ids[learnt]), tokenizer.detokenize(ids[~learnt])
    assert '"name": "add"' in said and "It is 3." in said and "a sum" in given and "It is" not in given
    assert Encoder(tokenizer, unmarked(template))(Chat(WITH_TOOLS, (TOOL,)))[1].tolist() == learnt.tolist()


@pytest.mark.parametrize("name", ["chatml", "zephyr", "mistral"])
def test_tools_are_not_left_out_in_silence(name: str, family: Family) -> None:
    tokenizer = family(name)
    encode = Encoder(tokenizer, template_of(name, tokenizer))
    for tools, messages in (((TOOL,), CHATS["one"]), (None, WITH_TOOLS)):
        with pytest.raises(RecordError, match="has no form for"):
            encode(Chat(messages, tools))
    # Others' templates do it without a word.
    silent = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}{% endfor %}"
    encode = Encoder(tokenizer, ChatTemplate(silent, "theirs"))
    for tools, messages, what in (((TOOL,), CHATS["one"], "tools"), (None, WITH_TOOLS, "tool calls")):
        with pytest.raises(RecordError, match=f"has {what}, which theirs leaves out"):
            encode(Chat(messages, tools))
    written = silent.replace("{{ message.content }}", "{{ message.tool_calls or message.content }}{{ tools }}")
    Encoder(tokenizer, ChatTemplate(written, "theirs"))(Chat(WITH_TOOLS, (TOOL,)))


def test_the_tokenizers_own_template(tmp_path: Path, family: Family) -> None:
    given = family("zephyr")
    assert find_template(None, given) is None
    given.save(str(tmp_path))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "older"}))
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("with tools")
    with refuses("chat.template", None, "has several, none of them called default", "name the file"):
        find_template(None, load_tokenizer(str(tmp_path)))
    (tmp_path / "chat_template.jinja").write_text("old")
    before = find_template(None, load_tokenizer(str(tmp_path)))
    assert before is not None and (before.text, before.for_tools([TOOL])) == ("old", "with tools")
    before.save(tmp_path)
    assert find_template(None, load_tokenizer(str(tmp_path))) == before, "both are kept"
    template = template_of("zephyr", given)
    template.save(tmp_path)
    own = find_template(None, load_tokenizer(str(tmp_path)))
    assert own is not None and own.digest == template.digest and own.for_tools([TOOL]) == template.text


def test_a_chat_without_a_template_is_refused(family: Family) -> None:
    with refuses("chat.template", None, "has no chat template", "name a Jinja file"):
        Encoder(family("zephyr"), None)(Chat(CHATS["one"]))


def test_what_is_no_template_is_refused(tmp_path: Path, family: Family) -> None:
    tokenizer = family("zephyr")
    with refuses("chat.template", "nowhere.jinja", "is not a file", "zephyr"):
        find_template("nowhere.jinja", tokenizer)
    path = tmp_path / "broken.jinja"
    path.write_text("{% for message in messages %}\n{{ message.content }")
    with refuses("chat.template", path, "is not a Jinja template", "mend it"):
        find_template(str(path), tokenizer)
    path.write_bytes(b"\xff{{ messages }}")
    with refuses("chat.template", path, "is not UTF-8"):
        find_template(str(path), tokenizer)


def test_where_neither_marks_nor_prefixes_give_a_mask_the_chat_is_refused(family: Family) -> None:
    """As of templates that leave the thoughts of earlier answers out: then only the last one can be told."""
    text = (
        "{% for message in messages %}<|{{ message.role }}|>{% if loop.last or message.role != 'assistant' %}thought "
        "{% endif %}{{ message.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer, chat = family("zephyr"), Chat(turns("a", "b", "c", "d"))
    with pytest.raises(RecordError, match="message 2, that cannot be told from the rest"):
        Encoder(tokenizer, ChatTemplate(text, "it"))(chat)
    ids, learnt = Encoder(tokenizer, ChatTemplate(text, "it"), last=True)(chat)
    assert tokenizer.detokenize(ids[learnt]).strip() == "thought d</s>"
    marked = "{% for message in messages %}{{ message.content }}{% endfor %}{% generation %}{% endgeneration %}"
    with pytest.raises(RecordError, match="no token that is learnt"):
        Encoder(tokenizer, ChatTemplate(marked, "it"))(chat)
    with pytest.raises(RecordError, match=r"does not suit it .*only once"):
        Encoder(tokenizer, ChatTemplate("{{ raise_exception('only once') }}", "it"))(chat)


def test_several_spans_of_an_answer(family: Family) -> None:
    """Of which answer they are is told by where the messages before it end."""
    text = (
        "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}"
        "{% endgeneration %}|{% generation %}{{ eos_token }}{% endgeneration %}{% else %}{{ message.content }}"
        "{% endif %}{% endfor %}"
    )
    tokenizer = family("chatml")
    chat = Chat(turns("one", "two", "three", "four"))
    ids, learnt = Encoder(tokenizer, ChatTemplate(text, "it"))(chat)
    assert tokenizer.detokenize(ids[learnt]) == "two<|im_end|>four<|im_end|>"
    _, last = Encoder(tokenizer, ChatTemplate(text, "it"), last=True)(chat)
    assert tokenizer.detokenize(ids[last]) == "four<|im_end|>"


@pytest.mark.parametrize("name", TEMPLATES)
def test_texts_begin_with_one_bos_and_end_with_one_eos(name: str, family: Family) -> None:
    tokenizer = family(name)
    encode = Encoder(tokenizer, None)
    ids, learnt = encode(Completion("import json\ndef", " load(file):\n"))
    assert ids.tolist() == [*tokenizer.tokenize_prompt("import json\ndef load(file):\n"), tokenizer.eos]
    assert tokenizer.detokenize(ids[learnt]).lstrip().startswith("load(file)") and learnt[-1]
    assert tokenizer.detokenize(ids[~learnt]).endswith("import json\ndef")
    if tokenizer.bos is not None:
        mark = tokenizer.pieces()[tokenizer.bos]
        again, _ = encode(Completion(f"{mark}import json\ndef", f" load{tokenizer.pieces()[tokenizer.eos]}"))
        assert list(again).count(tokenizer.bos) == 1 == list(again[-2:]).count(tokenizer.eos)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(("prompt", "text"), [("def", "import json"), ("self", ".x"), ("A: ", "json"), ("", "json")])
def test_no_token_spans_prompt_and_answer(name: str, prompt: str, text: str, family: Family) -> None:
    """Though together they may be one word: what is learnt follows the ids that the prompt alone has."""
    tokenizer = family(name)
    ids, learnt = Encoder(tokenizer, None)(Completion(prompt, text))
    given = tokenizer.tokenize_prompt(prompt) if prompt else [tokenizer.bos] * (tokenizer.bos is not None)
    assert ids[~learnt].tolist() == given and learnt[len(given) :].all()
    assert tokenizer.detokenize(ids[learnt][:-1]).strip() == text and ids[-1] == tokenizer.eos


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_that_begin_with_white_space(name: str, family: Family) -> None:
    """Of which some tokenizers' offsets leave out the white space."""
    tokenizer = family(name)
    template, chat = template_of(name, tokenizer), Chat(turns("a", "  b", "c", "\td \n"))
    ids, learnt = Encoder(tokenizer, template)(chat)
    assert learnt.tolist() == Encoder(tokenizer, unmarked(template))(chat)[1].tolist()
    said = tokenizer.detokenize(ids[learnt])
    assert "b" in said and "d" in said and "c" not in said
    # These two trim what is said.
    assert name in ("llama-3.1", "nemotron") or " b" in said


def test_rows_that_the_model_lacks_are_refused(family: Family) -> None:
    from dataclasses import replace

    tokenizer = replace(family("chatml"), rows=100)
    with pytest.raises(RecordError, match=r"beyond the model's vocab_size=100"):
        Encoder(tokenizer, None)(Completion("import", " json"))


def test_an_exported_tokenizer_of_ours(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Until it gets a template, the names of its marks are characters to it."""
    from transformers import AutoTokenizer

    save_for_transformers(tokenizer, str(tmp_path))
    exported = load_tokenizer(str(tmp_path))
    template, messages = template_of("zephyr", exported), turns("def f(self):", "  pass", system="Python.")
    ids, learnt = Encoder(exported, template)(Chat(messages))
    assert list(ids).count(exported.eos) == 3 and exported.tokenize("</s>") != [exported.eos]
    template.save(tmp_path)
    expected: Any = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        list(messages), return_dict=True, return_assistant_tokens_mask=True
    )
    assert (ids.tolist(), learnt.tolist()) == (expected["input_ids"], [bool(x) for x in expected["assistant_masks"]])
    again = load_tokenizer(str(tmp_path))
    own = find_template(None, again)
    assert own is not None and own.own and Encoder(again, own)(Chat(messages))[0].tolist() == ids.tolist()
    assert again.fingerprint == exported.fingerprint


def test_a_sentencepiece_tokenizer_of_ours(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Its marks' names in a template are those marks, as for the exported tokenizer with the template beside it."""
    from transformers import AutoTokenizer

    path = tmp_path / "own.jinja"
    path.write_text(template_of("zephyr", tokenizer).text)
    template = find_template(str(path), tokenizer)
    assert template is not None
    messages = turns("def f(self):", "    return self", "and g?", "  pass\n", system="Python.")
    ids, learnt = Encoder(tokenizer, template)(Chat(messages))
    ends = learnt[ids == tokenizer.eos].tolist()
    assert ends == [False, False, True, False, True]
    assert Encoder(tokenizer, unmarked(template))(Chat(messages))[1].tolist() == learnt.tolist()
    saved = tmp_path / "saved"
    tokenizer.save(str(saved))
    template.save(saved)
    save_for_transformers(load_tokenizer(str(saved)), str(tmp_path / "exported"))
    check_saved(tokenizer, str(tmp_path / "exported"))
    exported = AutoTokenizer.from_pretrained(tmp_path / "exported")
    expected: Any = exported.apply_chat_template(list(messages), return_dict=True, return_assistant_tokens_mask=True)
    assert (ids.tolist(), learnt.tolist()) == (expected["input_ids"], [bool(x) for x in expected["assistant_masks"]])
