"""Training a SentencePiece tokenizer."""

from __future__ import annotations

import io
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from minitron_mcore.data.config import TokenizerConfig
from minitron_mcore.data.corpus import Texts, make_parent
from minitron_mcore.data.records import Replacements, read_records, texts_of
from minitron_mcore.data.tokenizer import Tokenizer, load_tokenizer
from minitron_mcore.errors import InputError
from minitron_mcore.files import first_line, whole_file
from minitron_mcore.runtime.progress import Bar, Progress, progress

PASSAGE_CHARACTERS = 2_000  # a training "sentence": whole lines, so that pieces may span a line end

# What SentencePiece says of a number of pieces that cannot be, as a rule and a remedy.
_SMALL = "is too small, because bytes and characters alone are {}"
SIZES = (
    (r"value <= (\d+)", "is too large for this text, which has {} pieces", "set it to that or less, or give more text"),
    (r"required_chars\. \d+ vs (\d+)", _SMALL, "raise it, or lower tokenizer.character_coverage"),
)


def train_tokenizer(
    config: TokenizerConfig,
    texts: Texts,
    *,
    seed: int,
    report: Callable[[str], None] = print,
    progress: Progress = progress,
) -> Tokenizer:
    """Train a SentencePiece BPE model with byte fallback on `texts` and write it to `config.model`.

    Text comes back as it went in, white space included (one exception, SentencePiece's own: a literal U+2581 comes back
    as a space). Ids follow Llama: unk 0, bos 1, eos 2, then the 256 bytes. One process calls it. Raises InputError.
    """
    assert config.model, "tokenizer.model names the file to write"
    replacements = Replacements()
    files = texts.files

    def documents(bar: Bar) -> Iterator[str]:
        for file in files:
            for record in read_records(file, [config.json_key]):
                yield texts_of(record, file.form, file.path, [config.json_key], replacements)[0]
            bar.advance(file.size)

    with progress(sum(file.size for file in files), "B", "tokenizer: reading") as bar:
        passages, read = _sample(_passages(documents(bar)), config.input_sentence_size, seed)
    if not passages:
        rule = f"holds no text, because its {len(files)} files are empty"
        raise InputError(texts.key, config.input, rule, "name others")
    size = sum(map(len, passages))
    report(
        f"tokenizer: {len(files):,} files, {read / 1e6:,.1f}M characters; training {config.vocab_size:,} pieces on "
        f"{size / 1e6:,.1f}M of them"
    )
    if warning := str(replacements):
        report(warning)
    started = time.perf_counter()
    with progress(None, "", "tokenizer: training") as bar, _heartbeat(bar):
        model = _train_sentencepiece(passages, config, texts.key)
    make_parent(config.model, "tokenizer.model")
    with whole_file(config.model) as partial:
        partial.write_bytes(model)
    report(f"tokenizer: {config.model} written after {time.perf_counter() - started:.1f} s")
    return load_tokenizer(config.model)


def _train_sentencepiece(passages: list[str], config: TokenizerConfig, key: str) -> bytes:
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
        for pattern, rule, remedy in SIZES:
            if found := re.search(pattern, str(error)):
                rule = rule.format(found[1])
                raise InputError("tokenizer.vocab_size", config.vocab_size, rule, remedy) from error
        rule = f"cannot be trained on by SentencePiece ({first_line(error)})"
        raise InputError(key, config.input, rule, "name other text") from error
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


@contextmanager
def _heartbeat(bar: Bar) -> Iterator[None]:
    """Shows the time every second while SentencePiece, which reports nothing readable, trains."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(1.0):
            bar.show()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
