"""The one exception that means: what the user gave is wrong (exit code 2, one sentence, no traceback)."""


class InputError(ValueError):
    """Wrong input. The message names the value seen, the rule it breaks and the key to change."""
