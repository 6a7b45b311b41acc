"""Tiny tokenizers of the kinds that the built-in templates are for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from minitron_mcore.data.chat.config import TEMPLATES
from minitron_mcore.data.tokenizer import Tokenizer, load_tokenizer
from tests.unit.text_data import JSON_PACKAGE, python_files

# Of each template the marks that its tokenizer has, with bos and eos.
MARKS: dict[str, tuple[list[str], str | None, str]] = {
    "chatml": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|im_end|>"),
    "qwen2.5": (["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"], None, "<|im_end|>"),
    "llama-3.1": (
        ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"],
        "<|begin_of_text|>",
        "<|eot_id|>",
    ),
    "mistral": (["<unk>", "<s>", "</s>"], "<s>", "</s>"),
    "zephyr": (["<unk>", "<s>", "</s>"], "<s>", "</s>"),
    "nemotron": (["<unk>", "<s>", "</s>", "<extra_id_0>", "<extra_id_1>"], "<s>", "</s>"),
}
SPACE = "\u2581"


def save_tokenizer(folder: Path, name: str) -> Path:
    """Byte-level BPE as of GPT-2 and Llama 3, or for mistral and zephyr BPE over words with U+2581, as of Llama 2."""
    marks, bos, eos = MARKS[name]
    fast = tokenizers.Tokenizer(models.BPE(unk_token="<unk>" if "<unk>" in marks else None))
    settings: dict[str, Any] = {"show_progress": False, "vocab_size": 500, "special_tokens": marks}
    if name in ("mistral", "zephyr"):
        fast.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")  # sentencepiece merges within words alone
        fast.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
        fast.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    else:
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.decoder = decoders.ByteLevel()
        settings["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    texts = [path.read_text(encoding="utf-8") for path in python_files(JSON_PACKAGE)]
    fast.train_from_iterator(texts, trainers.BpeTrainer(**settings))
    if name in ("mistral", "zephyr"):
        fast.pre_tokenizer = None
    steps: list[Any] = [] if name in ("mistral", "zephyr") else [processors.ByteLevel(trim_offsets=True)]
    if bos:
        steps.append(processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, marks.index(bos))]))
    if steps:
        fast.post_processor = processors.Sequence(steps)
    folder.mkdir(parents=True)
    fast.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, **({"bos_token": bos} if bos else {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokenizer]:
    """The tiny tokenizer of a template."""
    folder = tmp_path_factory.mktemp("families")
    found = {name: load_tokenizer(str(save_tokenizer(folder / name, name))) for name in TEMPLATES}
    return found.__getitem__
