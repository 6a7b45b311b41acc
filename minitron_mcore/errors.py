"""The exceptions whose message is all that a user has to see."""


class InputError(ValueError):
    """Wrong input (exit code 2). The message, one sentence, names the value seen, the rule and the key to change."""


class MemoryExhaustedError(RuntimeError):
    """Memory ran out while running (exit code 1). The message says what needs it, and which keys help."""
