"""The types that Adam's state is kept in on a rank: fp32, or what Transformer Engine's Adam takes, Megatron's
"precision-aware" one. A checkpoint holds it in fp32 either way. Pure."""

from __future__ import annotations

from typing import Any, NamedTuple

from minitron_mcore.training.config import NarrowConfig

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}


class AdamState(NamedTuple):
    """main: of the weights that the optimizer keeps beside bf16 ones."""

    is_aware: bool = False
    main: str = "fp32"
    exp_avg: str = "fp32"
    exp_avg_sq: str = "fp32"

    @classmethod
    def of(cls, train: NarrowConfig) -> AdamState:
        """As a recipe's section has it."""
        if not train.use_precision_aware_optimizer:
            return FULL
        return cls(True, train.main_params_dtype, train.exp_avg_dtype, train.exp_avg_sq_dtype)

    def bytes_each(self, precision: str) -> int:
        """Of a parameter whose weight is of `precision`; fp32 ones are the main weights themselves."""
        main = 0 if precision == "fp32" else BYTES[self.main]
        return main + BYTES[self.exp_avg] + BYTES[self.exp_avg_sq]

    def megatron_fields(self, types: dict[str, Any]) -> dict[str, Any]:
        """Of OptimizerConfig. types: torch's, by their names here."""
        if not self.is_aware:
            return {}
        named = {"main_params_dtype": self.main, "exp_avg_dtype": self.exp_avg, "exp_avg_sq_dtype": self.exp_avg_sq}
        # Else an fp32 main weight is kept as the half that the bf16 weight lacks, which megatron-core saves as if it
        # were the weight.
        whole = {"store_param_remainders": False}
        return {"use_precision_aware_optimizer": True, **{name: types[kind] for name, kind in named.items()}, **whole}


FULL = AdamState()
