"""Recipe section `chat`."""

from typing import Annotated, Optional

from minitron_mcore.errors import InputError
from minitron_mcore.keys import OneOf, PathName, Sources, key, section

EXTENSIONS = (".jsonl", ".ndjson", ".json", ".parquet")
# Templates that come with the package, by name.
TEMPLATES = ("chatml", "llama-3.1", "mistral", "nemotron", "qwen2.5", "zephyr")


@section
class ChatConfig:
    """Chats and preferences that models are trained on, and which of their tokens count."""

    train: Sources = key(None, "chats or preferences: a file, folder or glob, or a list of them; JSON or Parquet")
    valid: Sources = key(None, "the same, held out; null: chat.valid_fraction of chat.train")
    valid_fraction: float = key(0.0, "share of chat.train held out, in records", at_least=0, below=1)
    extensions: list[str] = key(list(EXTENSIONS), "endings of files taken from folders, compressed or not")
    template: Optional[PathName] = key(
        None, f"a Jinja file, or one of {', '.join(TEMPLATES)}; null: the tokenizer folder's own"
    )
    texts: Annotated[str, OneOf("as_they_are", "turns")] = key(
        "as_they_are",
        "prompts and answers given as text: read on as they are, or put into the template as a user's and an "
        "assistant's turn",
    )
    counted: Annotated[str, OneOf("all", "last")] = key("all", "which of the assistant's turns are learnt")
    too_long: Annotated[str, OneOf("leave_out", "cut")] = key(
        "leave_out",
        "what is longer than data.sequence_length; cut: chats at their end, preferences at the prompt's beginning",
    )
    bad_records: Annotated[str, OneOf("refuse", "skip")] = key(
        "refuse", "records that break a rule; skip: they are counted, and the first is named"
    )
    packing: bool = key(False, "several samples in a sequence, each attending to itself alone")
    cache_path: Optional[PathName] = key(
        None, "folder of the prepared tokens; null: `chats` in the run's output", may_change=True
    )
    workers: Optional[int] = key(
        None,
        "processes that prepare; null: one for every core, where there is much to read",
        at_least=1,
        may_change=True,
    )

    def __post_init__(self) -> None:
        if self.valid is not None and self.valid_fraction:
            raise InputError("valid_fraction", self.valid_fraction, "has no effect with chat.valid", "leave one out")
