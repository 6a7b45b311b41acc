"""What is known of chats and preferences before their tokens are prepared: the files, the template, the settings. Pure.

Whatever a job would refuse without reading every record is refused here.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Optional

import xxhash

from minitron_mcore.data.chat.config import TEMPLATES, ChatConfig
from minitron_mcore.data.chat.template import KEY as TEMPLATE_KEY
from minitron_mcore.data.chat.template import ChatTemplate, find_template
from minitron_mcore.data.corpus import Texts, find_files
from minitron_mcore.data.text_file import TEXT, TextFile, inspect_files
from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.errors import InputError
from minitron_mcore.files import reading
from minitron_mcore.keys import Sources

FORMAT = 1  # of what is written; another one is prepared anew
CHATS, PAIRS = "chats", "pairs"
BLOCK_BYTES = 1 << 20
# Keys of the section that decide what is written, beside the files.
DECIDING = ("texts", "counted", "too_long", "bad_records", "packing", "valid_fraction")


@dataclass(frozen=True)
class Preparation:
    """What tokens are made of. template: None where the tokenizer has none, which texts alone can do without.

    pairs: preferences are read, not chats; needs_rewards: and each has two. seed: draws what is held out.
    """

    train: Texts
    valid: Optional[Texts]
    tokenizer: Tokenizer
    template: Optional[ChatTemplate]
    config: ChatConfig
    sequence_length: int
    pairs: bool
    needs_rewards: bool
    seed: int

    @property
    def kind(self) -> str:
        return PAIRS if self.pairs else CHATS

    def settings(self) -> dict[str, Any]:
        """All that decides what is written, but for the files' content."""
        return {
            "format": FORMAT,
            "kind": self.kind,
            "tokenizer": self.tokenizer.fingerprint,
            "template": self.template.digest if self.template else None,
            "sequence_length": self.sequence_length,
            "needs_rewards": self.needs_rewards,
            **{name: getattr(self.config, name) for name in DECIDING},
            "seed": self.seed if self.config.valid_fraction else None,
        }

    def sources(self) -> dict[str, list[dict[str, str]]]:
        """Of each part, the files and their checksums. Reads all of them."""
        parts = {"train": self.train, "valid": self.valid}
        return {
            name: [{"path": file.path, "xxh3_128": _checksum(file)} for file in texts.files]
            for name, texts in parts.items()
            if texts is not None
        }


def describe_chats(
    config: ChatConfig,
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    pairs: bool = False,
    needs_rewards: bool = False,
    seed: int = 0,
) -> Preparation:
    """The files that `chat.train` and `chat.valid` name, and the template, all looked at. Any rank calls.

    Raises InputError for files that are missing or hold no records, and for a template that is missing or broken.
    """
    train = find_texts(config.train, "chat.train", config)
    valid = None if config.valid is None else find_texts(config.valid, "chat.valid", config)
    template = find_template(config.template, tokenizer)
    if template is None and config.texts == "turns":
        rule = f"is not given, and the tokenizer in {tokenizer.path} has no chat template for chat.texts=turns"
        raise InputError(TEMPLATE_KEY, None, rule, f"name a Jinja file, or one of {', '.join(TEMPLATES)}")
    return Preparation(train, valid, tokenizer, template, config, sequence_length, pairs, needs_rewards, seed)


def digest_of(settings: dict[str, Any], sources: dict[str, list[dict[str, str]]]) -> str:
    """sha256 in hex, of all that decides what is written; where the files lie does not."""
    content = {name: [file["xxh3_128"] for file in files] for name, files in sources.items()}
    return hashlib.sha256(json.dumps([settings, content], sort_keys=True).encode()).hexdigest()


def find_texts(sources: Sources, key: str, config: ChatConfig) -> Texts:
    """The files that `sources` names by `key`. Raises InputError for files that are missing or hold no records."""
    if sources is None:
        raise InputError(key, None, "is not set", "name a file, folder or glob of JSON lines or Parquet")
    notes: list[str] = []
    files = inspect_files(find_files(sources, config.extensions, key, (), notes.append), notes.append)
    if plain := next((file.path for file in files if file.form == TEXT), None):
        raise InputError(key, plain, "is plain text, which holds no records", "write JSON lines or Parquet")
    return Texts(key, tuple(files), tuple(notes))


def _checksum(file: TextFile) -> str:
    digest = xxhash.xxh3_128()
    with reading(file.path), open(file.path, "rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
