"""Alignment: supervised fine-tuning on answers, and preference optimisation on pairs of them."""
