"""Recipe section `importance`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Optional

from minitron_mcore.errors import InputError

AGGREGATIONS = ("mean", "l2", "var")
PAIRS = tuple(f"{batch}/{sequence}" for batch in AGGREGATIONS for sequence in AGGREGATIONS)
NEURON_SITES = ("pre_activation", "down_projection_input")
METHODS = ("activation", "magnitude", "random")
# On the questions of `multiple_choice`.
TASK_METRICS = ("accuracy", "normalized_accuracy")
# block_influence comes with every pass; the others cost passes of their own.
DEPTH_METRICS = ("block_influence", "lm_loss", "logit_mse", "normalized_logit_mse", *TASK_METRICS)


@dataclass
class ImportanceConfig:
    """How the teacher's axes are scored (arXiv 2407.14679, section 2.2 and table 13)."""

    # activation (a forward pass), or what it is compared with: magnitude (L2 norms of the weights), random (by `seed`).
    method: str = "activation"
    num_samples: int = 1024  # calibration samples, drawn by the recipe's seed
    micro_batch_size: int = 1
    batch_aggregation: str = "l2"  # l2, mean or var, over the samples
    sequence_aggregation: str = "mean"  # l2, mean or var, over a sample's tokens
    # pre_activation (the paper's, for an MLP without a gate) or down_projection_input, after activation and gate, which
    # keeps the better neurons of a gated MLP (docs/log.md, 2026-11-22).
    neuron_site: str = "down_projection_input"
    # From the same pass, beside the choice above: further pairs, as in mean/mean (BATCH/SEQUENCE), and neuron sites.
    aggregations: list[str] = field(default_factory=list)
    neuron_sites: list[str] = field(default_factory=list)
    # What the model loses without a layer, or without a block of each of `block_lengths`: lm_loss, logit_mse,
    # normalized_logit_mse, accuracy and normalized_accuracy (on the questions of `multiple_choice`).
    depth_metrics: list[str] = field(default_factory=list)
    block_lengths: list[int] = field(default_factory=lambda: [1])
    multiple_choice: Optional[str] = None  # JSONL file: context, choices, answer


def variant_name(batch: str, sequence: str, site: str) -> str:
    """How scores name one choice of aggregations and neuron site: BATCH/SEQUENCE/SITE."""
    return f"{batch}/{sequence}/{site}"


def variant_names(config: ImportanceConfig) -> list[str]:
    """Every choice that is asked for, the primary one first."""
    pairs = [f"{config.batch_aggregation}/{config.sequence_aggregation}", *config.aggregations]
    sites = [config.neuron_site, *config.neuron_sites]
    return list(dict.fromkeys(f"{pair}/{site}" for site in dict.fromkeys(sites) for pair in pairs))


def check_importance(config: ImportanceConfig) -> None:
    """Raise InputError, naming the key, for what nothing can be scored with."""
    for name in ("num_samples", "micro_batch_size"):
        if getattr(config, name) < 1:
            raise InputError(f"importance.{name}={getattr(config, name)} must be at least 1")
    _check_one("method", config.method, METHODS)
    _check_one("batch_aggregation", config.batch_aggregation, AGGREGATIONS)
    _check_one("sequence_aggregation", config.sequence_aggregation, AGGREGATIONS)
    _check_one("neuron_site", config.neuron_site, NEURON_SITES)
    _check_list("aggregations", config.aggregations, PAIRS)
    _check_list("neuron_sites", config.neuron_sites, NEURON_SITES)
    _check_list("depth_metrics", config.depth_metrics, DEPTH_METRICS)
    _check_list("block_lengths", config.block_lengths, None)
    asking = [metric for metric in config.depth_metrics if metric in TASK_METRICS]
    if asking and not config.multiple_choice:
        raise InputError(
            f"importance.depth_metrics holds {asking[0]!r}, which asks questions: name their JSONL file as "
            "importance.multiple_choice"
        )
    if config.multiple_choice and not asking:
        raise InputError(
            f"importance.multiple_choice={config.multiple_choice} holds questions that no metric asks: add accuracy to "
            "importance.depth_metrics, or leave the file out"
        )
    if config.method == "activation":
        return
    for name in ("aggregations", "neuron_sites", "depth_metrics"):
        if given := getattr(config, name):
            raise InputError(
                f"importance.{name}={given} needs a forward pass, which importance.method={config.method} does not "
                f"make: leave it out, or set importance.method=activation"
            )


def _check_one(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(f"importance.{name}={value!r} is not allowed: choose one of {', '.join(allowed)}")


def _check_list(name: str, values: Sequence[object], allowed: Optional[Sequence[str]]) -> None:
    """Members must be of `allowed`, where given, else whole numbers of at least 1; each at most once."""
    for place, value in enumerate(values):
        if allowed is not None and value not in allowed:
            raise InputError(f"importance.{name} holds {value!r}: choose from {', '.join(allowed)}")
        if allowed is None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InputError(f"importance.{name} holds {value!r}: whole numbers of at least 1 are needed")
        if value in values[:place]:
            raise InputError(f"importance.{name} holds {value!r} twice: name each once")
