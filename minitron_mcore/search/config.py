"""Recipe section `ablate`."""

from minitron_mcore.errors import InputError
from minitron_mcore.importance.config import DepthMetric, Method, NeuronSite, Pair
from minitron_mcore.keys import key, section
from minitron_mcore.pruning.config import RESIDUAL_MATRICES, HeadResidual, LayerChoice


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

    def __post_init__(self) -> None:
        for place, value in enumerate(self.residual_matrices):
            if not {*value.split("+")} <= {*RESIDUAL_MATRICES}:
                rule = f"must be names of {', '.join(RESIDUAL_MATRICES)}, joined by +"
                raise InputError(f"residual_matrices[{place}]", value, rule, "as in query+output")
