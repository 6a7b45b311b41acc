"""Recipe section `bench`."""

from typing import Annotated, Optional, Union

from pydantic import Field

from minitron_mcore.keys import OneOf, PathName, key, section

Positive = Annotated[int, Field(ge=1)]
Several = Annotated[int, Field(ge=2)]


@section
class BenchConfig:
    """Prefill and decode of `checkpoints`, measured: every engine and model in turn, at each size."""

    engines: list[Annotated[str, OneOf("minitron", "transformers", "vllm", "llama.cpp")]] = key(
        [], "none: all that are installed; with several ranks minitron alone", distinct=True
    )
    batch_size: Union[Positive, list[Positive]] = key([1, 4], "sequences at a time", filled=True, distinct=True)
    prompt_tokens: Union[Positive, list[Positive]] = key(128, "tokens of each prompt", filled=True, distinct=True)
    output_tokens: Union[Several, list[Several]] = key(64, "tokens made for each", filled=True, distinct=True)
    repeats: int = key(5, "how often each is measured; the table shows medians", at_least=1)
    warmup: int = key(1, "how often each runs before", at_least=0)
    threads: Optional[int] = key(
        None, "of each engine on a CPU; null: OMP_NUM_THREADS, else the cores over the ranks", at_least=1
    )
    time_limit: float = key(
        1800.0, "seconds that another engine may take to load a model, or to answer a batch; then it is ended", above=0
    )
    loaded: Annotated[str, OneOf("together", "in_turn")] = key(
        "together",
        "together: every model in every engine; in_turn: each is loaded for its turn, where a device holds but one",
    )
    hf: dict[str, PathName] = key(
        {}, "by the model's name, its exported folder, which the other engines read; else one is made for the while"
    )
    gguf: dict[str, PathName] = key(
        {}, "by the model's name, its GGUF file, which llama.cpp reads; else one is made for the while"
    )
    converter: Optional[PathName] = key(None, "llama.cpp's convert_hf_to_gguf.py, which makes GGUF files")
    python: dict[str, PathName] = key(
        {}, "by the engine (vllm, llama_cpp), the Python that has it, where that is not this one"
    )
    output: Optional[PathName] = key(None, "file to write; null: bench.json in `output`")

    def sizes(self, name: str) -> list[int]:
        """The values of batch_size, prompt_tokens or output_tokens."""
        given = getattr(self, name)
        return given if isinstance(given, list) else [given]
