"""Recipe section `importance`."""

from dataclasses import dataclass


@dataclass
class ImportanceConfig:
    """How the teacher's axes are scored (arXiv 2407.14679, section 2.2 and table 13)."""

    num_samples: int = 1024  # calibration samples, drawn by the recipe's seed
    micro_batch_size: int = 1
    batch_aggregation: str = "l2"  # l2, mean or var, over the samples
    sequence_aggregation: str = "mean"  # l2, mean or var, over a sample's tokens
    # pre_activation (the paper's, for an MLP without a gate) or down_projection_input, after activation and gate, which
    # keeps the better neurons of a gated MLP (docs/log.md, 2026-11-22).
    neuron_site: str = "down_projection_input"
