"""Recipe sections `ablate` and `search`."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, Optional, Union

from pydantic import Field

from minitron_mcore.errors import InputError, shown
from minitron_mcore.importance.config import DepthMetric, Method, NeuronSite, Pair
from minitron_mcore.keys import OneOf, key, section
from minitron_mcore.pruning.config import RESIDUAL_MATRICES, HeadResidual, LayerChoice
from minitron_mcore.reading import whole_number

_SHARE = re.compile(r"(\d+)/(\d+)")


def share_of(share: str, key_name: str = "share") -> tuple[int, int]:
    """(first, count) of a share FIRST/COUNT: every COUNT-th entry of a list from FIRST on. Raises InputError."""
    match = _SHARE.fullmatch(share)
    if not match or int(match[1]) >= int(match[2]):
        raise InputError(key_name, share, "must be NUMBER/COUNT, numbers from 0 on, as 0/8 to 7/8")
    return int(match[1]), int(match[2])


def of_share(entries: Sequence[Any], share: str) -> Sequence[Any]:
    """The `entries` that the share is."""
    first, count = share_of(share)
    return entries[first::count]


@section
class AblateConfig:
    """The grid of choices: every combination that makes a difference is pruned in memory and evaluated, untrained."""

    methods: list[Method] = key(["activation"], "importance.method", filled=True, distinct=True)
    aggregations: list[Pair] = key(["l2/mean"], "BATCH/SEQUENCE", filled=True, distinct=True)
    neuron_sites: list[NeuronSite] = key(
        ["down_projection_input"], "importance.neuron_site", filled=True, distinct=True
    )
    depth_metrics: list[DepthMetric] = key(["block_influence"], "prune.depth_metric", filled=True, distinct=True)
    layers: list[LayerChoice] = key(["scattered"], "prune.layers", filled=True, distinct=True)
    head_residuals: list[HeadResidual] = key(["none"], "prune.head_residual", filled=True, distinct=True)
    residual_matrices: list[str] = key(
        ["query+output"], "prune.residual_matrices, joined by +", filled=True, distinct=True
    )
    per_axis: bool = key(
        False, "beside the student's whole shape, each of its smaller axes alone: depth, hidden, ffn, attention"
    )
    random_seeds: int = key(1, "how often method random is drawn, from `seed` on", at_least=1)
    share: Optional[str] = key(
        None, "NUMBER/COUNT: only that share of the students, without the closing table; `submit` sets it"
    )

    def __post_init__(self) -> None:
        if self.share:
            share_of(self.share)
        for place, value in enumerate(self.residual_matrices):
            if not {*value.split("+")} <= {*RESIDUAL_MATRICES}:
                rule = f"must be names of {', '.join(RESIDUAL_MATRICES)}, joined by +"
                raise InputError(f"residual_matrices[{place}]", value, rule, "as in query+output")


AXES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
MOST_SIZES = 1000  # of a range; more is a slip of the pen
_RANGE = re.compile(r"([^-:]+)(?:-([^-:]+)(?::([^-:]+))?)?")
# Sizes of one axis: numbers, and ranges as text, FIRST-LAST or FIRST-LAST:STEP, both ends among them.
Sizes = Optional[list[Union[int, str]]]
# A target, met within `tolerance`, or [least, most], of which one may be null.
Count = Optional[Union[int, list[Optional[int]]]]
Number = Optional[Union[float, list[Optional[float]]]]
_STAYS = "[29,30], or ranges as [29-32] and [4096-6144:512]; null: the teacher's"


@section
class BudgetConfig:
    """What a candidate may be. Each key is a target, met within `tolerance`, or [least, most]; null: no budget."""

    tolerance: float = key(0.05, "how far from a target a candidate may be, as a share of it", at_least=0, below=1)
    total_parameters: Count = key(None, "every stored parameter, as 8B or [7.5B,8.5B]")
    non_embedding_parameters: Count = key(None, "parameters without the embedding and the output head")
    memory: Count = key(None, "bytes of the weights and the KV cache, at serving.*")
    flops_per_token: Count = key(None, "of a token's forward pass at data.sequence_length")
    prefill_latency: Number = key(None, "seconds to the first token of a batch, at serving.* on cluster.device")
    decode_latency: Number = key(None, "seconds a step that makes one token of each sequence of a batch")
    latency: Number = key(None, "seconds of a whole batch: prefill, then serving.output_tokens steps")
    prefill_throughput: Number = key(None, "tokens a second of prefill")
    decode_throughput: Number = key(None, "tokens a second of decode")

    def __post_init__(self) -> None:
        self.bounds()

    def bounds(self) -> dict[str, tuple[float, float]]:
        """(least, most) of every figure that has a budget. Raises InputError for a budget that nothing could meet."""
        found = {}
        for name, value in self.given().items():
            if isinstance(value, list):
                if len(value) != 2 or (value[0] or 0, value[1]) == (0, None):
                    remedy = "write null for an end that is open, or give the target alone"
                    raise InputError(name, value, "must be a target, or [least, most]", remedy)
                least, most = (
                    default if end is None else end for end, default in zip(value, (0, math.inf), strict=True)
                )
            else:
                least, most = value * (1 - self.tolerance), value * (1 + self.tolerance)
            if not 0 <= least <= most or most == 0:
                raise InputError(name, value, "must be above 0, and the least at most the most")
            found[name] = (float(least), float(most))
        return found

    def given(self) -> dict[str, Any]:
        """The budgets that the recipe gives, as it writes them."""
        names = (entry.name for entry in dataclasses.fields(self) if entry.name != "tolerance")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@section
class HalvingConfig:
    """Successive halving: at each rung the better share of the candidates trains on, the others stop."""

    rungs: list[Annotated[int, Field(ge=1)]] = key(
        [], "tokens at which candidates are compared; none: all train to the end", distinct=True
    )
    keep: float = key(0.5, "share that trains on, at least one", above=0, below=1)


@section
class SearchConfig:
    """The grid of candidates, their budgets, and how they are ranked (arXiv 2407.14679, section 2.3)."""

    num_layers: Sizes = key(None, _STAYS, filled=True, distinct=True)
    hidden_size: Sizes = key(None, _STAYS, filled=True, distinct=True)
    ffn_hidden_size: Sizes = key(None, _STAYS, filled=True, distinct=True)
    ffn_ratio: Optional[list[Annotated[float, Field(gt=0)]]] = key(
        None, "instead of ffn_hidden_size: ffn_hidden_size / hidden_size, as [2.5,3,3.5,4]", filled=True, distinct=True
    )
    num_attention_heads: Sizes = key(None, _STAYS, filled=True, distinct=True)
    num_query_groups: Sizes = key(None, _STAYS, filled=True, distinct=True)
    budget: BudgetConfig = key(BudgetConfig, "what a candidate may cost")
    most: Optional[int] = key(
        None, "train only so many, those nearest to the middle of the budgets; null: all", at_least=1
    )
    train: bool = key(True, "rank the candidates by short distillations; false: only list them")
    tokens: int = key(0, "tokens that each candidate is distilled for; the papers: 400 steps", at_least=0)
    schedule: Annotated[str, OneOf("distill", "search")] = key(
        "distill",
        "of the learning rate: that of distill.tokens, of which the search is the first part, so that `distill` goes "
        "on from the winner; or one of its own that ends at search.tokens",
    )
    halving: HalvingConfig = key(HalvingConfig, "stop the worse candidates early")
    side_by_side: int = key(1, "candidates at a time, each on its own subset of the ranks", at_least=1, may_change=True)
    keep_checkpoints: Optional[int] = key(
        None,
        "of so many of the best; the others' are deleted once it is clear which; null: all",
        at_least=1,
        may_change=True,
    )
    stop: Optional[int] = key(
        None,
        "train the candidates that are left to this rung, from 1 on (the last is search.tokens), and rank nothing; "
        "`submit` sets it",
        at_least=1,
        may_change=True,
    )
    share: Optional[str] = key(
        None, "NUMBER/COUNT: of those, only that share; goes with stop, and `submit` sets it", may_change=True
    )

    def __post_init__(self) -> None:
        self.axes()
        if self.share and share_of(self.share) and self.stop is None:
            raise InputError("share", self.share, "has no effect without stop", "give both, or leave it out")
        if self.ffn_ratio and self.ffn_hidden_size:
            rule = f"and ffn_hidden_size={shown(self.ffn_hidden_size)} are both given"
            raise InputError("ffn_ratio", self.ffn_ratio, rule, "leave one of them out")
        if self.most and not self.budget.given():
            rule = "keeps the candidates nearest to the middle of the budgets, and none is given"
            raise InputError("most", self.most, rule, "give one of budget.*, or leave it out")

    def axes(self) -> dict[str, list[int]]:
        """The sizes of every axis that is given, by Megatron's name, ranges written out. Raises InputError."""
        given = {name: getattr(self, name) for name in AXES}
        return {name: written_out(sizes, name) for name, sizes in given.items() if sizes is not None}


def _parts(match: re.Match[str] | None) -> tuple[str, str, str]:
    """First, last and step of a range, or of a number alone. Raises ValueError for what is neither."""
    if match is None:
        raise ValueError
    return match[1], match[2] or match[1], match[3] or "1"


def written_out(sizes: Sequence[int | str], name: str) -> list[int]:
    """Numbers and ranges (FIRST-LAST, FIRST-LAST:STEP) to numbers, each once, in the order given. Raises InputError,
    naming the entry of the key `name`."""
    found: dict[int, None] = {}
    for place, size in enumerate(sizes):
        called, match = f"{name}[{place}]", _RANGE.fullmatch(str(size))
        try:
            first, last, step = (whole_number(part) for part in _parts(match))
        except ValueError:
            rule, remedy = "must be a whole number or a range", "as 4096, 29-32 or 4096-6144:512"
            raise InputError(called, size, rule, remedy) from None
        if not (1 <= first <= last and step >= 1):
            raise InputError(called, size, "must go up from at least 1, in steps of at least 1")
        if (last - first) % step:
            rule = f"does not end at {last} in steps of {step}, and both ends of a range belong to it"
            raise InputError(called, size, rule, f"end at {last - (last - first) % step}")
        if (last - first) // step >= MOST_SIZES:
            raise InputError(called, size, f"names more than {MOST_SIZES} sizes", "take larger steps")
        found |= dict.fromkeys(range(first, last + 1, step))
    return list(found)
