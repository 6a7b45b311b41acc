"""Recipe section `importance`."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Optional

from pydantic import Field

from minitron_mcore.errors import InputError
from minitron_mcore.keys import OneOf, PathName, key, refuse_idle, section

AGGREGATIONS = ("mean", "l2", "var")
NEURON_SITES = ("pre_activation", "down_projection_input")
# Measured on the questions of `multiple_choice`.
TASK_METRICS = ("accuracy", "normalized_accuracy")
LOGIT_METRICS = ("logit_mse", "normalized_logit_mse")
TEXT_METRICS = ("lm_loss", *LOGIT_METRICS)

Aggregation = Annotated[str, OneOf(*AGGREGATIONS)]
Pair = Annotated[str, OneOf(*(f"{batch}/{sequence}" for batch in AGGREGATIONS for sequence in AGGREGATIONS))]
NeuronSite = Annotated[str, OneOf(*NEURON_SITES)]
Method = Annotated[str, OneOf("activation", "magnitude", "random")]
DepthMetric = Annotated[str, OneOf("block_influence", *TEXT_METRICS, *TASK_METRICS)]


@section
class ImportanceConfig:
    """How the teacher's axes are scored (arXiv 2407.14679, section 2.2 and table 13)."""

    method: Method = key(
        "activation",
        "activation: a forward pass; to compare with: magnitude (L2 norms of the weights) and random (by seed)",
    )
    num_samples: int = key(1024, "calibration samples, drawn by the recipe's seed", at_least=1)
    micro_batch_size: int = key(1, "samples at a time", at_least=1, may_change=True)
    batch_aggregation: Aggregation = key("l2", "how values are aggregated over the samples")
    sequence_aggregation: Aggregation = key("mean", "how they are aggregated over a sample's tokens, before")
    # The second keeps the better neurons of a gated MLP (docs/log.md, 2026-11-22).
    neuron_site: NeuronSite = key(
        "down_projection_input",
        "pre_activation: the paper's, for an MLP without a gate; down_projection_input: after activation and gate",
    )
    aggregations: list[Pair] = key([], "further pairs BATCH/SEQUENCE from the same pass", distinct=True)
    neuron_sites: list[NeuronSite] = key([], "further neuron sites from the same pass", distinct=True)
    depth_metrics: list[DepthMetric] = key(
        [],
        "what the model loses without a layer, or without a block of each of importance.block_lengths",
        distinct=True,
    )
    block_lengths: list[Annotated[int, Field(ge=1)]] = key(
        [1], "layers of the blocks that importance.depth_metrics leave out", distinct=True
    )
    multiple_choice: Optional[PathName] = key(
        None, "JSONL file of questions for accuracy and normalized_accuracy: context, choices, answer"
    )

    def __post_init__(self) -> None:
        asking = [metric for metric in self.depth_metrics if metric in TASK_METRICS]
        if asking and not self.multiple_choice:
            remedy = "name a JSONL file of questions as importance.multiple_choice"
            raise InputError("depth_metrics", self.depth_metrics, f"holds {asking[0]}, which needs questions", remedy)
        if self.multiple_choice and not asking:
            remedy = "add accuracy to importance.depth_metrics, or leave it out"
            rule = "holds questions, but no metric needs them"
            raise InputError("multiple_choice", self.multiple_choice, rule, remedy)
        if self.method != "activation":
            words = f"with importance.method={self.method}, which makes no forward pass"
            idle = dict.fromkeys(("aggregations", "neuron_sites", "depth_metrics"), words)
            refuse_idle(self, idle, "leave it out, or set importance.method=activation")


def variant_names(config: ImportanceConfig) -> list[str]:
    """Every choice that is asked for as BATCH/SEQUENCE/SITE, the primary one first."""
    pairs = [f"{config.batch_aggregation}/{config.sequence_aggregation}", *config.aggregations]
    sites = [config.neuron_site, *config.neuron_sites]
    return list(dict.fromkeys(f"{pair}/{site}" for site in dict.fromkeys(sites) for pair in pairs))


def measured(metrics: Iterable[str]) -> list[str]:
    """The metrics that need passes of their own; block influence comes with the activations."""
    return [metric for metric in metrics if metric != "block_influence"]


def blocks_of(metrics: Sequence[str], lengths: Sequence[int], num_layers: int) -> list[range]:
    """Every block of every length to leave out, by length, then by first layer; none where no metric asks.

    Raises InputError for blocks that are empty or all of the model.
    """
    key, lengths = "importance.block_lengths", [*lengths] if metrics else []
    if metrics and not lengths:
        raise InputError(key, [], "is empty", "name the lengths of the blocks to leave out, as in [1]")
    for length in lengths:
        if not 1 <= length < num_layers:
            rule = f"holds {length}, but the model has {num_layers} layers"
            raise InputError(key, lengths, rule, f"choose lengths from 1 to {num_layers - 1}")
    return [range(start, start + length) for length in lengths for start in range(num_layers - length + 1)]
