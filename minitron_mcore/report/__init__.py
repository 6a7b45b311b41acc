"""What a reader is shown of a model: its card."""
