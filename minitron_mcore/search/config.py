"""Recipe section `ablate`."""

from dataclasses import dataclass, field


@dataclass
class AblateConfig:
    """The grid of choices: every combination that makes a difference is pruned in memory and evaluated, untrained."""

    methods: list[str] = field(default_factory=lambda: ["activation"])  # activation, magnitude, random
    aggregations: list[str] = field(default_factory=lambda: ["l2/mean"])  # BATCH/SEQUENCE, each of mean, l2, var
    neuron_sites: list[str] = field(default_factory=lambda: ["down_projection_input"])
    depth_metrics: list[str] = field(default_factory=lambda: ["block_influence"])
    layers: list[str] = field(default_factory=lambda: ["scattered"])  # scattered, contiguous
    head_residuals: list[str] = field(default_factory=lambda: ["none"])  # none, paper, laco
    residual_matrices: list[str] = field(default_factory=lambda: ["query+output"])  # joined by +
    # Beside the student's whole shape, each of its smaller axes by itself: depth, hidden, ffn, attention.
    per_axis: bool = False
    random_seeds: int = 1  # how often method random is drawn, from `seed` on
