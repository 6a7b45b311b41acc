"""transformers' tokenizer for one of ours, against the one that AutoTokenizer loads from the exported files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from minitron_mcore.data.templating import templating, transformers_tokenizer
from minitron_mcore.data.tokenizer import Tokenizer, load_tokenizer
from minitron_mcore.data.tokenizer_json import save_for_transformers

TEMPLATE = "{% for message in messages %}{{ bos_token }}[{{ message.role }}] {{ message.content }}{% endfor %}"
CHAT = [{"role": "user", "content": "import json"}]
TEXT = "def read(self):\n    return self.text  # größer\n"


@pytest.fixture
def kinds(tokenizer: Tokenizer, tmp_path: Path) -> list[Tokenizer]:
    """A SentencePiece model with a template beside it, and the same as a Hugging Face folder."""
    shutil.copyfile(tokenizer.path, tmp_path / "tokenizer.model")
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    bare = load_tokenizer(str(tmp_path))
    save_for_transformers(bare, str(tmp_path / "hf"))
    return [bare, load_tokenizer(str(tmp_path / "hf"))]


def test_it_is_the_exported_one(kinds: list[Tokenizer], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    exported = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for tokenizer in kinds:
        for found in (
            transformers_tokenizer(tokenizer),
            transformers_tokenizer(tokenizer, {"model_type": "llama"}),
            templating(tokenizer),
        ):
            assert found.encode(TEXT) == exported.encode(TEXT) == tokenizer.tokenize(TEXT)
            assert found.apply_chat_template(CHAT, tokenize=False) == "<s>[user] import json"
            assert found.name_or_path == tokenizer.path
        assert templating(tokenizer) is templating(tokenizer)


def test_the_model_says_which_class_where_the_tokenizer_does_not(kinds: list[Tokenizer], tmp_path: Path) -> None:
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    del settings["tokenizer_class"]
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(settings))
    _, tokenizer = kinds
    names = []
    for kind in ("GPT2TokenizerFast", "PreTrainedTokenizerFast"):
        found = transformers_tokenizer(tokenizer, {"model_type": "llama", "tokenizer_class": kind})
        names.append(type(found).__name__)
    assert names[0].startswith("GPT2Tokenizer") and not names[1].startswith("GPT2")


def test_without_a_template_there_is_none(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_for_transformers(tokenizer, str(tmp_path))
    assert templating(tokenizer) is None and templating(load_tokenizer(str(tmp_path))) is None
