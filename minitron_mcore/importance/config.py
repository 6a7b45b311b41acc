"""Recipe section `importance`."""

from dataclasses import dataclass


@dataclass
class ImportanceConfig:
    """How the teacher's axes are scored (arXiv 2407.14679, section 2.2 and table 13)."""

    num_samples: int = 1024  # calibration samples, drawn by the recipe's seed
    micro_batch_size: int = 1
    batch_aggregation: str = "l2"  # l2, mean or var, over the samples
    sequence_aggregation: str = "mean"  # l2, mean or var, over a sample's tokens
    neuron_site: str = "pre_activation"  # pre_activation (paper) or down_projection_input
