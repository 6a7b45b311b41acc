"""Recipe section `distill`: everything of `train`, and the losses."""

from typing import Annotated, Any, Optional

from minitron_mcore.errors import InputError
from minitron_mcore.keys import OneOf, PathName, key, refuse_idle, section
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.training.config import TrainConfig

# Divergences of two distributions; the other losses compare logits.
PROBABILISTIC = ("forward_kl", "reverse_kl", "jensen_shannon")
DIVERGENCES = (*PROBABILISTIC, "mse", "cosine")
SITES = ("embedding", "block_output", "mlp_input", "attention_relation")
# Two fp32 buffers of a 16th of the tokens are 0.5 bytes for each token and vocabulary entry (0.75 where the CPU copies
# one). Larger chunks read and write the head and its gradient fewer times.
LEAST_CHUNK = 128
# Logits that one thread processes at a time on the CPU: half a megabyte of fp32, so that those of two models and a
# temporary stay in a core's cache.
CACHED_ENTRIES = 1 << 17
# fp32 numbers of one buffer of an attention relation's sweep over rows, at most; it has about five of them.
RELATION_BUFFER = 1 << 24
# The loss is T^2 times a divergence that shrinks as 1 / T^2, so that its rounding in fp32 grows as T^2: some 1e-8 T^2
# in the mean of 64 tokens of 300 ids: at T = 100 a few percent of a loss of 0.001. Far below 1 the logits over T leave
# fp32's range.
_TEMPERATURE: Any = {"at_least": 1e-3, "at_most": 100, "remedy": "beyond, fp32 cannot tell the distributions apart"}
_MIX: Any = {"above": 0, "below": 1, "remedy": "for the limits set distill.logit_loss=forward_kl or reverse_kl"}
# What distill.teacher begins with where it names a cache.
CACHE = "cache:"


def default_chunk_tokens(tokens: int) -> int:
    """Of a microbatch's tokens, those whose logits exist at a time, where `loss_chunk_tokens` is left out."""
    return max(LEAST_CHUNK, tokens // 16)


@section
class HiddenStatesConfig:
    """Losses between inner states of teacher and student (arXiv 2407.14679, section 3)."""

    sites: list[Annotated[str, OneOf(*SITES)]] = key([], "states that are compared; none: no such loss", distinct=True)
    layers: Optional[list[list[int]]] = key(
        None, "[[teacher layer, student layer], …], from 0; null: the papers' default, from both depths"
    )
    loss: Annotated[str, OneOf("mse", "cosine")] = key("mse", "of all sites but attention relations, compared by KL")
    relation_heads: int = key(0, "of the attention relations; 0: what divides both models' query groups", at_least=0)
    weighting: Annotated[str, OneOf("fixed", "dynamic")] = key(
        "dynamic", "dynamic: weight * L_logits / L_states, bounded, at each step; fixed: weight"
    )
    weight: float = key(1.0, "weight of the states' loss", at_least=0)

    def __post_init__(self) -> None:
        pair = "[teacher layer, student layer]"
        for place, layers in enumerate(self.layers or []):
            if len(layers) != 2:
                raise InputError(f"layers[{place}]", layers, f"must be a pair {pair}, counted from 0")
            if layers in (self.layers or [])[:place]:
                raise InputError("layers", self.layers, f"holds the pair {layers} twice", "name each once")
        if self.layers == []:
            raise InputError("layers", [], "is empty", f"give pairs {pair}, or null for the default")
        section, sites = "distill.hidden_states", f"with distill.hidden_states.sites=[{', '.join(self.sites)}]"
        if not self.sites:
            others = ("layers", "loss", "relation_heads", "weighting", "weight")
            idle = dict.fromkeys(others, f"without {section}.sites")
            refuse_idle(self, idle, "leave it out, or name the sites that are compared")
        elif "attention_relation" not in self.sites:
            refuse_idle(self, {"relation_heads": sites}, "leave it out, or add attention_relation")
        elif len(self.sites) == 1:
            refuse_idle(self, {"loss": f"{sites}, which is compared by KL"}, "leave it out, or add another site")
        if self.sites == ["embedding"]:
            refuse_idle(self, {"layers": f"{sites}, which is one pair"}, "leave it out, or add another site")


@section
class DistillConfig(TrainConfig):
    """Training of the student from the teacher's output distribution (arXiv 2407.14679, section 3)."""

    teacher: Optional[PathName] = key(None, "null: the model teacher.checkpoint; cache:DIR: what `cache` wrote in DIR")
    logit_loss: Annotated[str, OneOf(*DIVERGENCES)] = key("forward_kl", "how both models' logits are compared")
    jensen_shannon_mix: float = key(0.5, "beta: the mixture is beta teacher + (1 - beta) student", **_MIX)
    temperature: float = key(1.0, "of both distributions; the papers' best of {0.1, 0.5, 1, 3}", **_TEMPERATURE)
    kd_weight: float = key(1.0, "weight of the logit loss, times temperature squared", at_least=0)
    lm_weight: float = key(0.0, "weight of the next-token loss; logged at every step whatever its weight", at_least=0)
    top_k: int = key(0, "of the teacher's logits compared, the rest as one bucket; 0: the whole vocabulary", at_least=0)
    recompute_loss: bool = key(False, "sweep over the loss again in backward, storing nothing between", may_change=True)
    teacher_window: int = key(
        0, "microbatches the teacher runs ahead, to bound memory; 0: the global batch", at_least=0, may_change=True
    )
    check_teacher: bool = key(
        True, "check the teacher by a microbatch before the first step: weights, loss, loss to itself", may_change=True
    )
    random_weights: bool = key(
        False, "begin with random weights of the student's shape, as a baseline (arXiv 2407.14679, table 1)"
    )
    correct_teacher: bool = key(False, "train the teacher on this data in the same job (arXiv 2408.11796, section 4)")
    hidden_states: HiddenStatesConfig = key(HiddenStatesConfig, "losses between inner states")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher is not None and self.teacher.removeprefix(CACHE) in ("", self.teacher):
            rule = "must be cache:DIR, where `cache` wrote DIR"
            raise InputError("teacher", self.teacher, rule, "leave it out for the model teacher.checkpoint")
        if self.kd_weight == self.lm_weight == 0:
            rule = "and distill.lm_weight=0 leave no loss for the output head, which hidden states do not reach"
            raise InputError("kd_weight", 0, rule, "raise one of them")
        if self.logit_loss != "jensen_shannon":
            idle = {"jensen_shannon_mix": f"with distill.logit_loss={self.logit_loss}"}
            refuse_idle(self, idle, "leave it out, or set distill.logit_loss=jensen_shannon")
        if self.top_k and self.logit_loss not in PROBABILISTIC:
            rule = f"leaves the rest as one outcome, which distill.logit_loss={self.logit_loss} cannot compare"
            remedy = f"choose one of {', '.join(PROBABILISTIC)}, or set distill.top_k=0"
            raise InputError("top_k", self.top_k, rule, remedy)
        if self.hidden_states.sites and self.teacher is not None:
            rule = f"needs a teacher that runs, but distill.teacher={self.teacher} holds only its output"
            raise InputError("hidden_states.sites", self.hidden_states.sites, rule, "leave one of the two out")


def check_window(window: int, parallel: ParallelConfig, key: str) -> None:
    """Raise InputError, naming `key`, where the schedule cannot take the teacher's windows of so many microbatches."""
    if parallel.virtual_pipeline and window % parallel.pipeline:
        multiples = f"of which the interleaved schedule takes multiples of {parallel.pipeline}"
        rule = f"must be 0, for the whole global batch, or a number of microbatches, {multiples}"
        raise InputError(key, window, rule)


@section
class CacheConfig:
    """The teacher's targets written to files, of the samples that `distill` will train on."""

    folder: Optional[PathName] = key(None, "written by `cache`, read with distill.teacher=cache:FOLDER")
    method: Annotated[str, OneOf("sampled", "top_k")] = key(
        "sampled", "sampled: ids drawn at random, unbiased; top_k: the most probable ids"
    )
    draws: int = key(
        50, "with sampled: mean number of draws a token (arXiv 2503.16870: 12 ids)", at_least=1, at_most=10_000
    )
    proposal_temperature: float = key(
        1.0, "with sampled: draws are from softmax(logits / (temperature * this))", **_TEMPERATURE
    )
    top_k: int = key(100, "with top_k: ids a token, the rest as one tail bucket; 0: the whole vocabulary", at_least=0)
    temperature: Optional[float] = key(None, "of the teacher's distribution; null: distill.temperature", **_TEMPERATURE)
    dtype: Annotated[str, OneOf("fp16", "fp32")] = key("fp16", "of stored log-probabilities; counts of draws are exact")
    num_samples: Optional[int] = key(None, "samples to cache; null: as many as distill.tokens takes", at_least=1)
    micro_batch_size: int = key(1, "samples at a time", at_least=1, may_change=True)
    chunk_tokens: int = key(128, "tokens whose logits exist at a time", at_least=1)
    shard_samples: int = key(1024, "samples of a file, which a killed run may lose", at_least=1)

    def __post_init__(self) -> None:
        is_drawn, why = self.method == "sampled", f"with cache.method={self.method}"
        idle = dict.fromkeys(("top_k",) if is_drawn else ("draws", "proposal_temperature"), why)
        refuse_idle(self, idle, f"leave it out, or set cache.method={'top_k' if is_drawn else 'sampled'}")
