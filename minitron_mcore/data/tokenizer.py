"""Tokenizers: load one for text, data and datasets; train a SentencePiece one.

`megatron.core.tokenizers` reads the same models to the same ids (a test holds this), but importing it costs every
worker process of `preprocess` four seconds; this module needs neither torch nor megatron.
"""

from __future__ import annotations

import io
import os
import random
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Optional, Union

from minitron_mcore.data.config import TokenizerConfig
from minitron_mcore.data.corpus import check_file, find_files, make_parent
from minitron_mcore.data.decoding import Replacements
from minitron_mcore.data.fingerprint import (
    PROBES,
    fingerprint,
    hugging_face_files_fingerprint,
    sentencepiece_file_fingerprint,
)
from minitron_mcore.data.long_text import encode_long
from minitron_mcore.data.records import documents
from minitron_mcore.data.text_file import inspect_files
from minitron_mcore.data.tokenizer_files import (
    CONFIG_FILES,
    MODEL,
    SETTINGS_FILES,
    SPECIAL,
    VOCABULARY_FILES,
    changed_by,
    check_added,
    copy_files,
    is_hugging_face,
)
from minitron_mcore.errors import InputError
from minitron_mcore.files import copy_file

SENTENCEPIECE = "SentencePieceTokenizer"
HUGGING_FACE = "HuggingFaceTokenizer"

NO_END = "has no end-of-sentence token, which ends each document"
PASSAGE_CHARACTERS = 2_000  # a training "sentence": whole lines, so that pieces may span a line end
SEGMENT_CHARACTERS = 1_000_000  # SentencePiece needs about 60 bytes a character while it encodes
# A unigram model adds scores up from the text's start, and rounding decides between cuts that are equally good: to get
# the whole text's ids to the last one it must be given the whole.
UNIGRAM_SEGMENT_CHARACTERS = 16_000_000


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
        ids = self.encode(text) if len(text) <= size else encode_long(self.encode, text, size)
        if self.rows is not None and ids and (largest := max(ids)) >= self.rows:
            raise InputError(f"{self.beyond(largest)}: {text[:60]!r} holds it")
        return ids

    def beyond(self, number: int) -> str:
        """That an id lies beyond the model's vocabulary, in words."""
        return (
            f"tokenizer.model={self.path}: id {number} ({self.pieces().get(number)!r}) is beyond the model's "
            f"vocab_size={self.rows}"
        )

    def detokenize(self, ids: Iterable[int]) -> str:
        return self.decode([int(token) for token in ids])

    def is_named_by(self, recorded: str) -> bool:
        """Whether `recorded`, a fingerprint beside data or in a lineage, is this tokenizer's; older forms count too."""
        if self.stands_in or recorded == self.fingerprint:
            return True
        if self.type == SENTENCEPIECE:
            return recorded == sentencepiece_file_fingerprint(self.path)
        if recorded == hugging_face_files_fingerprint(self.path, self.eod):
            return True
        model = os.path.join(self.path, "tokenizer.model")
        return (
            recorded == sentencepiece_file_fingerprint(model)
            and _load_sentencepiece(model).fingerprint == self.fingerprint
        )

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
        copy_files(self.path, folder, (*VOCABULARY_FILES, *SETTINGS_FILES, *CONFIG_FILES, "config.json"))


def load_tokenizer(source: Union[str, TokenizerConfig]) -> Tokenizer:
    """The tokenizer at a path, or the one of the recipe's section `tokenizer`. Any rank may call it.

    Raises InputError where there is none, where it is of another type, or where it has no end-of-sentence token.
    """
    path, kind = (source, None) if isinstance(source, str) else (source.model, source.type)
    if not path:
        raise InputError("tokenizer.model is not set; give a SentencePiece .model file or a Hugging Face folder")
    if not os.path.exists(path):
        raise InputError(f"tokenizer.model={path} does not exist; train one with the verb tokenizer, or give another")
    if os.path.basename(path) in ("tokenizer.json", "tokenizer_config.json"):
        path = os.path.dirname(path) or "."
    if os.path.isfile(path) and (changes := changed_by(path)):
        if kind == SENTENCEPIECE:
            raise InputError(
                f"tokenizer.type={kind}: {' and '.join(changes)} beside tokenizer.model={path} give it ids or marks "
                "that a SentencePiece model has not: leave tokenizer.type out, or copy the model into its own folder"
            )
        path = os.path.dirname(path) or "."
    if os.path.isdir(path):
        if kind == HUGGING_FACE or (kind is None and is_hugging_face(path)):
            return _load_hugging_face(path)
        if not os.path.isfile(os.path.join(path, MODEL)):
            raise InputError(f"tokenizer.model={path} holds neither tokenizer.json nor tokenizer.model")
        return load_tokenizer(TokenizerConfig(type=kind, model=os.path.join(path, MODEL)))
    if kind == HUGGING_FACE:
        raise InputError(f"tokenizer.model={path} is a file; tokenizer.type={kind} needs a folder")
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


def _load_sentencepiece(path: str) -> Tokenizer:
    import sentencepiece

    with open(path, "rb") as stream:
        model = stream.read()
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise InputError(f"tokenizer.model={path} is not a SentencePiece model") from error
    if processor.eos_id() < 0:
        raise InputError(f"tokenizer.model={path} {NO_END}: name a piece of it as eos_token in {SPECIAL} beside it")
    bos, eos, unk = (
        index if index >= 0 else None for index in (processor.bos_id(), processor.eos_id(), processor.unk_id())
    )
    ids = list(range(processor.get_piece_size()))
    pieces = dict(zip(ids, processor.id_to_piece(ids), strict=True))
    return Tokenizer(
        type=SENTENCEPIECE,
        path=path,
        vocab_size=len(ids),
        bos=bos,
        eod=processor.eos_id(),
        fingerprint=fingerprint(pieces.items(), {"bos": bos, "eos": eos, "unk": unk}, processor.encode),
        encode=processor.encode,
        decode=processor.decode,
        added=frozenset(number for number in ids if processor.is_control(number) or processor.is_unused(number)),
        pieces=lambda: pieces,
        is_unigram=_is_unigram(model),
    )


def _is_unigram(proto: bytes) -> bool:
    from sentencepiece import sentencepiece_model_pb2

    trainer = sentencepiece_model_pb2.ModelProto.FromString(proto).trainer_spec  # type: ignore[attr-defined]
    return trainer.model_type == trainer.UNIGRAM


def _load_hugging_face(folder: str) -> Tokenizer:
    # transformers takes seconds to import; SentencePiece users need not wait for it
    from transformers import AutoTokenizer

    try:
        # Not given, it asks at the terminal whether a folder's own code may run.
        model = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever the files broke in
        files = changed_by(os.path.join(folder, MODEL)) if os.path.isfile(os.path.join(folder, MODEL)) else ()
        beside = f"{' and '.join(files)} beside {MODEL} cannot be applied: " if files else ""
        way = " (save it as tokenizer.json, or move them away to read the model alone)" if files else ""
        needs_code = "trust_remote_code" in str(error)
        words = "it needs custom code, which is not run here: save it as tokenizer.json" if needs_code else ""
        raise InputError(
            f"tokenizer.model={folder} is no Hugging Face tokenizer: {beside}{words or _first_line(error)}{way}"
        ) from error
    if model.eos_token_id is None:
        raise InputError(f"tokenizer.model={folder} {NO_END}: name one as eos_token in its {SPECIAL}")
    check_added(folder, model.get_vocab().get)
    model.model_max_length = int(1e30)  # documents longer than a model's window are no mistake here

    def encode(text: str) -> list[int]:
        return list(model.encode(text, add_special_tokens=False))

    vocabulary = {index: piece for piece, index in model.get_vocab().items()}
    marks = {"bos": model.bos_token_id, "eos": model.eos_token_id, "unk": model.unk_token_id}
    return Tokenizer(
        type=HUGGING_FACE,
        path=folder,
        vocab_size=max(vocabulary) + 1,  # ids may have gaps
        bos=model.bos_token_id,
        eod=model.eos_token_id,
        fingerprint=fingerprint(vocabulary.items(), marks, encode),
        encode=encode,
        decode=lambda ids: str(model.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)),
        added=frozenset(model.added_tokens_decoder),
        pieces=lambda: vocabulary,
        is_unigram=type(getattr(getattr(model, "backend_tokenizer", None), "model", None)).__name__ == "Unigram",
    )


def train_tokenizer(config: TokenizerConfig, *, seed: int, report: Callable[[str], None] = print) -> Tokenizer:
    """Train a SentencePiece BPE model with byte fallback on `config.input` and write it to `config.model`.

    Text comes back as it went in, white space included (one exception, SentencePiece's own: a literal U+2581 comes back
    as a space). Ids follow Llama: unk 0, bos 1, eos 2, then the 256 bytes. One process calls it. Raises InputError.
    """
    if config.type not in (None, SENTENCEPIECE):
        raise InputError(f"tokenizer.type={config.type} cannot be trained here; use {SENTENCEPIECE}")
    if not config.model:
        raise InputError("tokenizer.model is not set; it names the file to write")
    if os.path.exists(config.model) and not config.overwrite:
        raise InputError(f"tokenizer.model={config.model} exists; give another name, or set tokenizer.overwrite=true")
    check_file(config.model, "tokenizer.model")
    files = find_files(config.input, config.extensions, "tokenizer.input", config.exclude, report)
    replacements = Replacements()
    texts = documents(inspect_files(files, report), config.json_key, replacements)
    passages, read = _sample(_passages(texts), config.input_sentence_size, seed)
    if not passages:
        raise InputError(f"tokenizer.input={config.input!r} holds no text: {len(files)} files are empty")
    size = sum(map(len, passages))
    report(
        f"tokenizer: {len(files):,} files, {read / 1e6:,.1f}M characters; training {config.vocab_size:,} pieces on "
        f"{size / 1e6:,.1f}M of them"
    )
    if warning := str(replacements):
        report(warning)
    started = time.perf_counter()
    with _Heartbeat(report, started):
        model = _train_sentencepiece(passages, config)
    make_parent(config.model, "tokenizer.model")
    with open(config.model + ".tmp", "wb") as stream:
        stream.write(model)
    os.replace(config.model + ".tmp", config.model)
    report(f"tokenizer: {config.model} written after {time.perf_counter() - started:.1f} s")
    return _load_sentencepiece(config.model)


def _train_sentencepiece(passages: list[str], config: TokenizerConfig) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(passages),
            model_writer=model,
            model_type="bpe",
            vocab_size=config.vocab_size,
            character_coverage=config.character_coverage,
            split_digits=config.split_digits,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,  # indentation: one piece, not one a space
            max_sentence_length=1 << 24,  # bytes; a longer line without end would be left out silently
            num_threads=config.num_threads,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        message = str(error)
        if most := re.search(r"value <= (\d+)", message):
            raise InputError(
                f"tokenizer.vocab_size={config.vocab_size} is too large for this text, which has {most[1]} pieces; "
                "set it to that or less, or give more text"
            ) from error
        if least := re.search(r"required_chars\. \d+ vs (\d+)", message):
            raise InputError(
                f"tokenizer.vocab_size={config.vocab_size} is too small: bytes and characters alone are {least[1]}; "
                "raise it, or lower tokenizer.character_coverage"
            ) from error
        raise InputError(f"tokenizer.input: SentencePiece could not train on it: {_first_line(error)}") from error
    return model.getvalue()


def _passages(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        # SentencePiece leaves out passages that hold a zero byte
        yield from (part for part in _segments(text.replace("\0", " "), PASSAGE_CHARACTERS) if part.strip())


def _segments(text: str, size: int) -> Iterator[str]:
    """`text` in parts of at most `size` characters, cut after a line end where there is one."""
    start = 0
    while len(text) - start > size:
        cut = text.rfind("\n", start, start + size) + 1 or start + size
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


def _sample(passages: Iterable[str], limit: int, seed: int) -> tuple[list[str], int]:
    """At most `limit` passages drawn evenly in one reading (0: all), and the number of characters read."""
    draw = random.Random(seed)
    kept: list[str] = []
    characters = 0
    for seen, passage in enumerate(passages):
        characters += len(passage)
        if limit <= 0 or len(kept) < limit:
            kept.append(passage)
        elif (place := draw.randrange(seen + 1)) < limit:
            kept[place] = passage
    return kept, characters


class _Heartbeat:
    """A line every ten seconds while SentencePiece, which reports nothing readable, trains."""

    def __init__(self, report: Callable[[str], None], started: float) -> None:
        self.report, self.started, self.done = report, started, threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True)

    def _beat(self) -> None:
        while not self.done.wait(10.0):
            self.report(f"tokenizer: training, {time.perf_counter() - self.started:.0f} s")

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
