"""Recipe sections `tokenizer`, `preprocess` and `data`."""

from typing import Annotated, Optional

from minitron_mcore.errors import InputError
from minitron_mcore.keys import Blend, OneOf, PathName, Sources, key, section

EXTENSIONS = (".txt", ".jsonl", ".ndjson", ".parquet")
# What is shorter is no document.
LEAST_DOCUMENT_BYTES = 100
_TAKEN = "endings of files taken from folders, in capitals too, and compressed (.gz, .zst, .bz2, .xz, .lzma)"
_SOURCES = "a file, folder or glob, or a list of them; null: the recipe's input"


@section
class TokenizerConfig:
    """Which tokenizer the recipe uses, and how the verb `tokenizer` trains one."""

    type: Optional[Annotated[str, OneOf("SentencePieceTokenizer", "HuggingFaceTokenizer")]] = key(
        None, "null: seen from what tokenizer.model is"
    )
    model: Optional[PathName] = key(None, "a SentencePiece .model file, or a Hugging Face folder")
    input: Sources = key(None, f"text to train on: {_SOURCES}")
    extensions: list[str] = key(list(EXTENSIONS), _TAKEN)
    exclude: list[str] = key([], "names of folders not to enter")
    json_key: str = key("text", "which value of a JSON line, or column of a Parquet file, is the text")
    vocab_size: int = key(32000, "pieces to train", at_least=1)
    character_coverage: float = key(
        0.9995, "share of characters with a piece; rarer ones are bytes", above=0, at_most=1
    )
    split_digits: bool = key(True, "every digit is a piece of its own")
    input_sentence_size: int = key(100_000, "passages of about 2,000 characters drawn for training; 0: all", at_least=0)
    num_threads: int = key(4, "threads of SentencePiece", at_least=1)
    overwrite: bool = key(False, "write over a model that exists")


@section
class PreprocessConfig:
    """Text to token ids. The names are those of Megatron's `preprocess_data.py`."""

    input: Sources = key(None, f"text: {_SOURCES}")
    output_prefix: Optional[PathName] = key(None, "path of the .bin/.idx, without ending; null: the recipe's")
    extensions: list[str] = key(list(EXTENSIONS), _TAKEN)
    exclude: list[str] = key([], "names of folders not to enter")
    json_keys: list[str] = key(
        ["text"], "values of a JSON line, or columns of a Parquet file, to take", filled=True, distinct=True
    )
    document_bytes: Optional[int] = key(
        None,
        "plain text that is longer is cut at blank lines into documents of at most so many bytes; 0: a file is a "
        "document; null: files above 64 KiB into 16 KiB if they end in .txt or in nothing, others not at all",
        at_least=0,
    )
    append_eod: bool = key(True, "end each document with a mark, since samples are cut across documents")
    workers: Optional[int] = key(None, "processes; null: one for every core this process may use", at_least=1)
    valid_fraction: float = key(0.0, "share of the documents held out under <output_prefix>_valid", at_least=0, below=1)
    overwrite: bool = key(False, "write over files that exist")

    def __post_init__(self) -> None:
        if self.document_bytes and self.document_bytes < LEAST_DOCUMENT_BYTES:
            raise InputError("document_bytes", self.document_bytes, f"must be 0 or at least {LEAST_DOCUMENT_BYTES}")


@section
class DataConfig:
    """What training, validation and calibration read.

    Each blend is one prefix, a list of prefixes (mixed by their token counts), or Megatron's weights and prefixes in
    turn, as a list or as one string: "0.3 first_text_document 0.7 second_text_document".
    """

    train: Blend = key(None, "a prefix, prefixes, or weights and prefixes in turn")
    valid: Blend = key(None, "the same; null: what data.split holds out of data.train, if that is enough")
    calibration: Blend = key(None, "the same; null: drawn from the training set")
    split: str = key("969,30,1", "shares of train, valid, test, in documents; read only where data.valid is null")
    sequence_length: int = key(4096, "tokens of a sample", at_least=1)
    cache_path: Optional[PathName] = key(
        None, "folder of the sample indices; null: `cache` beside the first prefix", may_change=True
    )
    eod_mask_loss: bool = key(False, "no loss at the marks between documents")
    reset_position_ids: bool = key(False, "Megatron's; only false is possible")
    reset_attention_mask: bool = key(False, "Megatron's; only false is possible")
    num_workers: int = key(
        2, "reading processes of a rank; 0 reads in the training process", at_least=0, may_change=True
    )

    def __post_init__(self) -> None:
        if self.reset_position_ids:
            rule = "has no effect, because rotary positions are counted from the sample's start"
            raise InputError("reset_position_ids", True, rule, "leave it out")
        if self.reset_attention_mask:
            rule = "is not possible, because attention here is causal, without a mask tensor"
            raise InputError("reset_attention_mask", True, rule, "leave it out")
