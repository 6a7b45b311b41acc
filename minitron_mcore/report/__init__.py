"""What a reader is shown: of a model its card, of a run its page."""
