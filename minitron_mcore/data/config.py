"""Recipe sections `tokenizer`, `preprocess` and `data`."""

from dataclasses import dataclass, field
from typing import Any, Optional

EXTENSIONS = (".txt", ".jsonl", ".ndjson", ".parquet")


@dataclass
class TokenizerConfig:
    """Which tokenizer the recipe uses, and how the verb `tokenizer` trains one."""

    type: Optional[str] = None  # SentencePieceTokenizer or HuggingFaceTokenizer; null: seen from what `model` is
    model: Optional[str] = None  # a SentencePiece .model file, or a Hugging Face folder
    input: Any = None  # text to train on: a file, folder or glob, or a list of them; null: the recipe's `input`
    # taken from folders, in capitals too, and compressed (.gz, .zst, .bz2, .xz, .lzma)
    extensions: list[str] = field(default_factory=lambda: list(EXTENSIONS))
    exclude: list[str] = field(default_factory=list)  # names of folders not to enter
    json_key: str = "text"  # which value of a JSON line, or column of a Parquet file, is the text
    vocab_size: int = 32000
    character_coverage: float = 0.9995  # rarer characters are spelled in bytes
    split_digits: bool = True
    input_sentence_size: int = 100_000  # passages of about 2,000 characters drawn for training; 0: all
    num_threads: int = 4
    overwrite: bool = False


@dataclass
class PreprocessConfig:
    """Text to token ids. The names are those of Megatron's `preprocess_data.py`."""

    input: Any = None  # a file, folder or glob, or a list of them; null: the recipe's `input`
    output_prefix: Optional[str] = None  # null: the recipe's `output_prefix`
    # taken from folders, in capitals too, and compressed (.gz, .zst, .bz2, .xz, .lzma)
    extensions: list[str] = field(default_factory=lambda: list(EXTENSIONS))
    exclude: list[str] = field(default_factory=list)  # names of folders not to enter
    json_keys: list[str] = field(default_factory=lambda: ["text"])  # of JSON lines; columns of a Parquet file
    # Plain text that is longer is cut at blank lines into documents of at most so many bytes; 0: a file is a document.
    # null: files above 64 KiB into 16 KiB if they end in .txt or in nothing; of others, such as .py, one document.
    document_bytes: Optional[int] = None
    append_eod: bool = True  # samples are cut across documents: without the mark they run together
    workers: Optional[int] = None  # null: every core this process may use
    log_interval: int = 1000  # documents between two lines of progress
    valid_fraction: float = 0.0  # share of the documents held out under <output_prefix>_valid
    overwrite: bool = False


@dataclass
class DataConfig:
    """What training, validation and calibration read.

    Each blend is one prefix, a list of prefixes (mixed by their token counts), or Megatron's weights and prefixes in
    turn, as a list or as one string: "0.3 first_text_document 0.7 second_text_document".
    """

    train: Any = None
    valid: Any = None  # null: `split` cuts `train`; what its default holds out may be too little, and none validates
    calibration: Any = None  # null: drawn from the training set
    split: str = "969,30,1"  # shares of train, valid, test, in documents; read only where `valid` is null
    sequence_length: int = 4096
    cache_path: Optional[str] = None  # folder of the sample indices; null: `cache` beside the first prefix
    eod_mask_loss: bool = False
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    num_workers: int = 2  # reading processes of a rank; 0 reads in the training process
