"""Prompts from files and templates, and continuations as text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from minitron_mcore.data.tokenizer import Tokenizer, load_tokenizer
from minitron_mcore.data.tokenizer_json import save_for_transformers
from minitron_mcore.inference.config import GenerateConfig
from minitron_mcore.inference.prompts import Continuation, Prompt, prompt_ids, read_prompts, stop_ids
from tests.refusals import refuses

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT = ({"role": "user", "content": "import json"},)
TEXT = "def read(self):\n    return self.text  # größer\n"


def test_prompts_of_a_text_file_are_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffdef f(\r\n\n  import json\n".encode())
    assert [prompt.text for prompt in read_prompts(GenerateConfig(prompts=str(path)))] == ["def f(", "  import json"]
    chats = read_prompts(GenerateConfig(prompts=str(path), chat=True))
    assert [chat.messages for chat in chats][1] == ({"role": "user", "content": "  import json"},)


def test_prompts_of_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a\\nb"}\n\n{"messages": [{"role": "user", "content": "c"}], "id": 3}\n')
    text, chat = read_prompts(GenerateConfig(prompts=str(path)))
    assert (text.as_json(), chat.as_json()) == (
        {"prompt": "a\nb"},
        {"messages": [{"role": "user", "content": "c"}]},
    )


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ('{"prompt": "a"', "is not JSON"),
        ('"a"', "is not a prompt"),
        ('{"prompt": 3}', "is not a prompt"),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "c"}]}', "is not a prompt"),
        ('{"messages": []}', "is not a prompt"),
        ('{"messages": [{"role": "user"}]}', "is not a prompt"),
    ],
)
def test_other_lines_are_refused_by_file_and_line(tmp_path: Path, line: str, rule: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "a"}}\n{line}\n')
    with refuses("", f"generate.prompts={path}, line 2", rule, "prompt"):
        read_prompts(GenerateConfig(prompts=str(path)))


def test_ids_are_those_of_the_exported_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_for_transformers(tokenizer, str(tmp_path))
    exported = AutoTokenizer.from_pretrained(tmp_path)
    (ids,) = prompt_ids([Prompt("", TEXT)], tokenizer, 64, "model")
    assert list(ids) == exported(TEXT)["input_ids"]
    assert prompt_ids([Prompt("", "")], tokenizer, 64, "model") == ((tokenizer.eod,),)


def test_marks_that_a_tokenizer_puts_before_a_text_are_kept(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """As Llama's: tokenizer.json has a template that begins with bos."""
    from tokenizers import Tokenizer as Fast
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    save_for_transformers(tokenizer, str(tmp_path))
    (tmp_path / "tokenizer.model").unlink()
    fast = Fast.from_file(str(tmp_path / "tokenizer.json"))
    fast.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast.save(str(tmp_path / "tokenizer.json"))
    marked = load_tokenizer(str(tmp_path))
    (ids,) = prompt_ids([Prompt("", TEXT)], marked, 64, "model")
    assert list(ids) == AutoTokenizer.from_pretrained(tmp_path)(TEXT)["input_ids"]
    assert ids[0] == 1 and list(ids[1:]) == marked.tokenize(TEXT) == tokenizer.tokenize(TEXT)


def test_messages_go_through_the_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Of a SentencePiece model with a template beside it, and of the same as a Hugging Face folder."""
    shutil.copyfile(tokenizer.path, tmp_path / "tokenizer.model")
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    bare = load_tokenizer(str(tmp_path))
    save_for_transformers(bare, str(tmp_path / "hf"))
    for each in (bare, load_tokenizer(str(tmp_path / "hf"))):
        (ids,) = prompt_ids([Prompt("", messages=CHAT)], each, 64, "model")
        assert list(ids) == tokenizer.tokenize("[user] import json\n[assistant]")


def test_marks_that_a_template_writes_are_the_tokenizers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Of a SentencePiece model as well, for which `</s>` in a text is four characters."""
    shutil.copyfile(tokenizer.path, tmp_path / "tokenizer.model")
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}{{ eos_token }}{{ bos_token }}")
    (ids,) = prompt_ids([Prompt("", messages=CHAT)], load_tokenizer(str(tmp_path)), 64, "model")
    assert list(ids) == [*tokenizer.tokenize("import json"), tokenizer.eod, tokenizer.bos]


def test_a_chat_needs_a_template_that_takes_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    where = "generate.prompts=p, line 1"
    with refuses("", where, "has no chat template", "plain prompts"):
        prompt_ids([Prompt(where, messages=CHAT)], tokenizer, 64, "model")
    shutil.copyfile(tokenizer.path, tmp_path / "tokenizer.model")
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with refuses("", where, "(roles must alternate)"):
        prompt_ids([Prompt(where, messages=CHAT)], load_tokenizer(str(tmp_path)), 64, "model")


def test_a_prompt_leaves_room_for_a_token(tokenizer: Tokenizer) -> None:
    count = len(tokenizer.tokenize(TEXT))
    assert prompt_ids([Prompt("", TEXT)], tokenizer, count + 1, "model")
    with refuses("", "here", f"has {count} tokens, and teacher takes max_position_embeddings={count}", "shorten"):
        prompt_ids([Prompt("here", TEXT)], tokenizer, count, "teacher")


def test_a_stop_text_is_found_across_tokens(tokenizer: Tokenizer) -> None:
    """Wherever it is in a text: at the token that completes it, and no earlier."""
    ids = tokenizer.tokenize(TEXT)
    pieces = Continuation(tokenizer)
    assert pieces.text(ids).strip() == TEXT.strip()
    whole = pieces.text(ids)
    for length in (1, 2, 7):
        for start in range(len(whole) - length):
            stop = whole[start : start + length]
            reader = Continuation(tokenizer, [stop])
            ended = next(count for count in range(1, len(ids) + 1) if reader.is_stopped(ids[:count]))
            assert stop in pieces.text(ids[:ended]) and stop not in pieces.text(ids[: ended - 1])
            assert reader.cut(ids[:ended]) == whole[: whole.find(stop)]


def test_a_leading_space_is_part_of_a_continuation(tokenizer: Tokenizer) -> None:
    """SentencePiece takes it off what it decodes."""
    joined, alone = tokenizer.tokenize("import json"), tokenizer.tokenize("import")
    assert joined[: len(alone)] == alone
    new = joined[len(alone) :]
    assert Continuation(tokenizer).text(new) == " json" and Continuation(tokenizer, [" "]).is_stopped(new)


def test_a_model_stops_where_its_source_says(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert stop_ids(tokenizer, tmp_path) == {tokenizer.eod}
    (tmp_path / "hugging_face").mkdir()
    (tmp_path / "hugging_face" / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert stop_ids(tokenizer, tmp_path) == {tokenizer.eod, 5}
    (tmp_path / "hugging_face" / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert stop_ids(tokenizer, tmp_path) == {tokenizer.eod, 7, 9}
