"""Tokenizers: load one for text, data and datasets. Pure.

`megatron.core.tokenizers` reads the same models to the same ids (a test holds this), but importing it costs every
worker process of `preprocess` four seconds; this module needs neither torch nor megatron.

A tokenizer's fingerprint is equal where the same ids mean the same, whatever the files look like: a SentencePiece model
and the tokenizer.json made from it share no byte, yet data of the one is data of the other.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

from minitron_mcore.data.config import TokenizerConfig
from minitron_mcore.data.long_text import encode_long
from minitron_mcore.data.tokenizer_files import (
    FILES,
    MODEL,
    SETTINGS_FILES,
    SPECIAL,
    VOCABULARY_FILES,
    changed_by,
    check_added,
    copy_files,
    is_hugging_face,
    parse_model,
)
from minitron_mcore.errors import InputError
from minitron_mcore.files import copy_file, first_line
from minitron_mcore.runtime.libraries import AS_DATA, imported

SENTENCEPIECE = "SentencePieceTokenizer"
HUGGING_FACE = "HuggingFaceTokenizer"

NO_END = "has no end-of-sentence token, which ends each document"
SEGMENT_CHARACTERS = 1_000_000  # SentencePiece needs about 60 bytes a character while it encodes
# A unigram model adds scores up from the text's start, and rounding decides between cuts that are equally good: to get
# the whole text's ids to the last one it must be given the whole.
UNIGRAM_SEGMENT_CHARACTERS = 16_000_000
# Texts whose cutting tells one set of merges, scores or normalization from another. Each begins with a letter, since
# the kinds differ in the space they put before a text that begins with one, and none holds the name of a mark.
# To change one would give every tokenizer another fingerprint than the one that its data and checkpoints record.
PROBES = (
    "The quick brown fox jumps over the lazy dog, and nobody was surprised by it.",
    "Pruning and distillation: internationalization, unbelievably, counterrevolutionaries, antidisestablishment.",
    "x = [1, 22, 333, 4444, 55555, 1234567890, 3.14159, -2e-10, 0xff]",
    "def f(self, *args):\n    if not args:\n        return None\n    for a in args:\n            print(a)\n",
    "a b  c   d    e\tf\t\tg\n\nh \n i\r\nj",
    "HTTP/1.1 200 OK; https://example.org/a_b/c-d?e=f&g=%20#h (it's, don't, WE'LL)",
    "Größe, naïve café, São Paulo, Łódź, œuvre, ΑΒΓ αβγ, Привет, мир",
    "e\u0301 \ufb01 \u2460 \u00bd \uff21 \u00a0 \u2026",
    "A漢字かな交じり文、한국어, العربية, עברית, हिन्दी, ไทย",
    "B🙂👩‍👩‍👧🇺🇳∑∫√≠≤",
)


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back; what `GPTDataset` asks of a tokenizer (`eod`, `pad`, `unique_identifiers`) included."""

    type: str  # SentencePieceTokenizer or HuggingFaceTokenizer
    path: str  # the .model file, or the Hugging Face folder
    vocab_size: int  # ids are in [0, vocab_size)
    bos: Optional[int]
    eod: int  # end of document, the tokenizer's end of sentence
    fingerprint: str  # sha256 in hex, of what the ids mean: the same wherever the files lie, and in either type
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    is_unigram: bool = False
    added: frozenset[int] = frozenset()  # ids that no ordinary text has: added tokens, and marks
    rows: Optional[int] = None  # of a model that has fewer than there are ids: no text may hold ids from there on
    stands_in: bool = False  # for any tokenizer that data or a checkpoint names
    pieces: Callable[[], dict[int, str]] = field(default=dict, compare=False, repr=False)  # what each id stands for
    encode_marked: Optional[Callable[[str], list[int]]] = None  # with its marks; None: it puts none

    # No id is padding: GPT samples are never padded, and a dataset would mask every label that equals it.
    pad = -1

    @property
    def eos(self) -> int:
        return self.eod

    @property
    def unique_identifiers(self) -> OrderedDict:
        """What dataset caches are keyed by."""
        return OrderedDict(type=self.type, fingerprint=self.fingerprint)

    def tokenize(self, text: str) -> list[int]:
        """Ids of `text`; neither bos nor eod is added. Very long texts are encoded in parts, to the same ids."""
        size = UNIGRAM_SEGMENT_CHARACTERS if self.is_unigram else SEGMENT_CHARACTERS
        return self._checked(self.encode(text) if len(text) <= size else encode_long(self.encode, text, size), text)

    def tokenize_prompt(self, text: str) -> list[int]:
        """Ids of a text that a model goes on with, as transformers gives them: with the tokenizer's own marks, such as
        Llama's bos; one that was trained here has none. Instead of no id at all, the end of a document."""
        encode = self.encode_marked or self.encode
        return self._checked(encode(text), text) or [self.eod]

    def _checked(self, ids: list[int], text: str) -> list[int]:
        if self.rows is not None and ids and (largest := max(ids)) >= self.rows:
            raise InputError("", repr(text[:60]), f"holds {self.beyond(largest)}", "leave such text out")
        return ids

    def beyond(self, number: int) -> str:
        """An id that lies beyond the model's vocabulary, in words."""
        piece = self.pieces().get(number)
        return f"id {number} ({piece!r}) of tokenizer.model={self.path}, beyond the model's vocab_size={self.rows}"

    def detokenize(self, ids: Iterable[int]) -> str:
        return self.decode([int(token) for token in ids])

    def is_named_by(self, recorded: str) -> bool:
        """Whether `recorded`, a fingerprint beside data or in a lineage, is this tokenizer's; older forms count too."""
        if self.stands_in or recorded == self.fingerprint:
            return True
        if self.type == SENTENCEPIECE:
            return recorded == files_fingerprint("", [self.path])
        if recorded == files_fingerprint(self.path, VOCABULARY_FILES, str(self.eod)):
            return True
        model = os.path.join(self.path, MODEL)
        is_its_model = os.path.isfile(model) and recorded == files_fingerprint(self.path, [MODEL])
        return is_its_model and _load_sentencepiece(model).fingerprint == self.fingerprint

    def save(self, folder: str) -> None:
        """Copy the tokenizer's files into `folder`, byte for byte, so that `load_tokenizer(folder)` gives the same."""
        os.makedirs(folder, exist_ok=True)
        if self.type == SENTENCEPIECE:
            copy_file(self.path, os.path.join(folder, MODEL))
            if os.path.basename(self.path) == MODEL:
                # Not tokenizer_config.json, with which the copy would be of the other type.
                copy_files(os.path.dirname(self.path) or ".", folder, SETTINGS_FILES)
            return
        # AutoTokenizer looks into the model's config.json for what tokenizer_config.json leaves open.
        copy_files(self.path, folder, (*FILES, "config.json"))


def load_tokenizer(source: Union[str, TokenizerConfig]) -> Tokenizer:
    """The tokenizer at a path, or the one of the recipe's section `tokenizer`. Any rank may call it.

    Raises InputError where there is none, where it is of another type, or where it has no end-of-sentence token.
    """
    path, kind = (source, None) if isinstance(source, str) else (source.model, source.type)
    if not path:
        remedy = "name a SentencePiece .model file or a Hugging Face folder"
        raise InputError("tokenizer.model", None, "is not set", remedy)
    if not os.path.exists(path):
        raise InputError("tokenizer.model", path, "does not exist", "train it with `tokenizer`, or name another")
    if os.path.basename(path) in ("tokenizer.json", "tokenizer_config.json"):
        path = os.path.dirname(path) or "."
    if os.path.isfile(path) and (changes := changed_by(path)):
        if kind == SENTENCEPIECE:
            reason = f"{' and '.join(changes)} beside it give ids or marks that a SentencePiece model lacks"
            rule = f"does not suit tokenizer.model={path}, because {reason}"
            remedy = "leave tokenizer.type out, or copy the model into a folder of its own"
            raise InputError("tokenizer.type", kind, rule, remedy)
        path = os.path.dirname(path) or "."
    if os.path.isdir(path):
        if kind == HUGGING_FACE or (kind is None and is_hugging_face(path)):
            return _load_hugging_face(path)
        if not os.path.isfile(os.path.join(path, MODEL)):
            rule = "holds neither tokenizer.json nor tokenizer.model"
            raise InputError("tokenizer.model", path, rule, "name another")
        return load_tokenizer(TokenizerConfig(type=kind, model=os.path.join(path, MODEL)))
    if kind == HUGGING_FACE:
        raise InputError("tokenizer.model", path, f"is a file, and tokenizer.type={kind} needs a folder", "name it")
    return _load_sentencepiece(path)


def cut_otherwise(tokenizer: Tokenizer) -> int:
    """Of PROBES, how many the model's own sentencepiece cuts otherwise than transformers, which reads a bare
    tokenizer.model with files beside that add to it; 0 where there is more to read or nothing to compare."""
    others = ("tokenizer.json", "tokenizer_config.json")
    model = os.path.join(tokenizer.path, MODEL)
    if not os.path.isfile(model) or any(os.path.isfile(os.path.join(tokenizer.path, name)) for name in others):
        return 0
    bare = _load_sentencepiece(model)
    return sum(bare.encode(probe) != tokenizer.encode(probe) for probe in PROBES)


def fingerprint(pieces: dict[int, str], marks: dict[str, Optional[int]], encode: Callable[[str], list[int]]) -> str:
    """sha256 in hex, of what each id stands for, which ids are the marks, and how `encode` cuts PROBES.

    `pieces` by their ids, with a SentencePiece model's signs: U+2581 for a space, <0x0A> for a byte.
    Ids of a probe count without their order: two cuts of one run of spaces, equally good to a unigram model, may come
    in either order by a rounding.
    """
    digest = hashlib.sha256()
    for number, piece in sorted(pieces.items()):
        text = piece.encode("utf-8", errors="surrogatepass")
        digest.update(b"%d %d " % (number, len(text)) + text)
    digest.update(repr(sorted(marks.items())).encode())
    for probe in PROBES:
        digest.update(repr(sorted(encode(probe))).encode())
    return digest.hexdigest()


def files_fingerprint(folder: str, names: Iterable[str], begins: str = "") -> str:
    """sha256 in hex of the files of these names that are in `folder`, end to end, behind `begins`: what data and
    checkpoints named a tokenizer by before fingerprints were of ids."""
    digest = hashlib.sha256(begins.encode())
    for path in (Path(folder, name) for name in names):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _load_sentencepiece(path: str) -> Tokenizer:
    import sentencepiece

    model = Path(path).read_bytes()
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise InputError("tokenizer.model", path, "is not a SentencePiece model", "name another") from error
    if processor.eos_id() < 0:
        raise InputError("tokenizer.model", path, NO_END, f"name a piece of it as eos_token in {SPECIAL} beside it")
    marks = {"bos": processor.bos_id(), "eos": processor.eos_id(), "unk": processor.unk_id()}
    ids = list(range(processor.get_piece_size()))
    trainer = parse_model(model).trainer_spec
    return _tokenizer(
        SENTENCEPIECE,
        path,
        dict(zip(ids, processor.id_to_piece(ids), strict=True)),
        {name: index if index >= 0 else None for name, index in marks.items()},
        encode=processor.encode,
        decode=processor.decode,
        added=frozenset(number for number in ids if processor.is_control(number) or processor.is_unused(number)),
        is_unigram=trainer.model_type == trainer.UNIGRAM,
    )


def _tokenizer(
    kind: str, path: str, pieces: dict[int, str], marks: dict[str, Any], encode: Callable[[str], list[int]], **rest: Any
) -> Tokenizer:
    return Tokenizer(
        type=kind,
        path=path,
        vocab_size=max(pieces) + 1,  # ids may have gaps
        bos=marks["bos"],
        eod=marks["eos"],
        fingerprint=fingerprint(pieces, marks, encode),
        encode=encode,
        pieces=lambda: pieces,
        **rest,
    )


def _load_hugging_face(folder: str) -> Tokenizer:
    # transformers takes seconds to import; SentencePiece users need not wait for it
    transformers = imported("transformers")
    try:
        # Not given, it asks at the terminal whether a folder's own code may run.
        model = transformers.AutoTokenizer.from_pretrained(folder, **AS_DATA)
    except Exception as error:  # transformers raises whatever the files broke in
        files = changed_by(os.path.join(folder, MODEL)) if os.path.isfile(os.path.join(folder, MODEL)) else ()
        beside = f"{' and '.join(files)} beside {MODEL} cannot be applied: " if files else ""
        way = ", or move them away to read the model alone" if files else ""
        needs_code = "trust_remote_code" in str(error)
        reason = "it needs custom code, which is not run here" if needs_code else beside + first_line(error)
        rule = f"cannot be read as a Hugging Face tokenizer ({reason})"
        raise InputError("tokenizer.model", folder, rule, f"save it as tokenizer.json{way}") from error
    if model.eos_token_id is None:
        raise InputError("tokenizer.model", folder, NO_END, f"name one as eos_token in its {SPECIAL}")
    check_added(folder, model.get_vocab().get)
    model.model_max_length = int(1e30)  # documents longer than a model's window are no mistake here

    def encode(text: str) -> list[int]:
        return list(model.encode(text, add_special_tokens=False))

    return _tokenizer(
        HUGGING_FACE,
        folder,
        {index: piece for piece, index in model.get_vocab().items()},
        {"bos": model.bos_token_id, "eos": model.eos_token_id, "unk": model.unk_token_id},
        encode=encode,
        encode_marked=lambda text: list(model.encode(text)),
        decode=lambda ids: str(model.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)),
        added=frozenset(model.added_tokens_decoder),
        is_unigram=type(getattr(getattr(model, "backend_tokenizer", None), "model", None)).__name__ == "Unigram",
    )
