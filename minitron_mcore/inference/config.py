"""Recipe section `generate`."""

from typing import Optional

from minitron_mcore.errors import InputError
from minitron_mcore.keys import PathName, key, refuse_idle, section


@section
class GenerateConfig:
    """Text that a model writes after a prompt. What is drawn depends on `seed`."""

    prompt: Optional[str] = key(None, "a prompt, as text")
    prompts: Optional[PathName] = key(
        None, 'file of prompts: JSON lines of {"prompt": text} or {"messages": [...]}, or a text of one a line'
    )
    chat: bool = key(False, "a prompt is a user's message in the tokenizer's chat template, as messages always are")
    max_new_tokens: int = key(64, "longest continuation", at_least=1)
    temperature: float = key(0.0, "0: always the likeliest token", at_least=0)
    top_p: float = key(
        1.0, "draw from the fewest likeliest tokens of at least this probability together", above=0, at_most=1
    )
    stop: list[str] = key([], "texts that end a continuation, and are cut off it", distinct=True)
    batch_size: int = key(16, "prompts at a time, of a data-parallel rank", at_least=1)
    output: Optional[PathName] = key(None, "JSON lines to write: every prompt with what each checkpoint wrote")

    def __post_init__(self) -> None:
        if self.prompt is not None and self.prompts is not None:
            raise InputError(
                "prompt", self.prompt, "is given beside generate.prompts", "add it to that file, or leave one out"
            )
        if "" in self.stop:
            raise InputError("stop", self.stop, "holds an empty text, which is everywhere", "leave it out")
        if self.temperature == 0:
            refuse_idle(self, {"top_p": "with generate.temperature=0"}, "raise that, or leave it out")
