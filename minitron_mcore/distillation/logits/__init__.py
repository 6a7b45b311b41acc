"""The distillation loss between logits, from hidden states."""
