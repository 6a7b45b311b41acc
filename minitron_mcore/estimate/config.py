"""Recipe sections `serving` and `estimate`."""

from typing import Annotated, Optional

from minitron_mcore.errors import InputError
from minitron_mcore.keys import OneOf, PathName, key, section


@section
class ServingConfig:
    """The inference that a shape's memory, latency and throughput are worked out for."""

    batch_size: int = key(1, "sequences at a time", at_least=1)
    prompt_tokens: int = key(1024, "tokens of each prompt", at_least=1)
    output_tokens: int = key(128, "tokens made for each", at_least=1)
    weights: Annotated[str, OneOf("fp32", "bf16", "fp8", "int4")] = key("bf16", "number format of the weights")
    kv_cache: Annotated[str, OneOf("fp32", "bf16", "fp16", "fp8")] = key("bf16", "number format of the KV cache")
    tensor: int = key(1, "GPUs that the matrices are cut over", at_least=1)
    measured: Optional[PathName] = key(
        None, "file of measured speeds, as `bench` writes it, which correct what is worked out"
    )
    engine: Optional[str] = key(None, "whose speeds of serving.measured count, where it holds several engines'")

    def __post_init__(self) -> None:
        if self.engine is not None and self.measured is None:
            raise InputError("engine", self.engine, "has no effect without measured", "name the file, or leave it out")


@section
class EstimateConfig:
    """What `estimate` reads besides the recipe, and how much it shows."""

    output: Optional[PathName] = key(None, "file to write; null: estimate.json in `output`, or none")
    layouts: int = key(8, "layouts in the table of the best", at_least=1)
    measured: Optional[PathName] = key(
        None, "folder of a training, whose metrics.jsonl says how much of its peak a device reaches"
    )
    curve: Optional[PathName] = key(
        None, "metrics.jsonl or candidates.json of distillations, to say what the student's loss may become"
    )
