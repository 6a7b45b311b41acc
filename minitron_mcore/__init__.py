"""Prune and distil large language models where they live, on sharded Megatron checkpoints."""

__version__ = "0.1.0"
