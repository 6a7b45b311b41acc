"""Recipe section `evaluate`."""

from minitron_mcore.keys import key, section


@section
class EvaluateConfig:
    """Held-out LM loss."""

    samples: int = key(64, "sequences of the validation set", at_least=1)
    micro_batch_size: int = key(1, "sequences at a time", at_least=1, may_change=True)
