"""The exceptions whose message is all that a user has to see."""


class InputError(ValueError):
    """Wrong input (exit code 2). The message, one sentence, names the value seen, the rule and the key to change."""

    exit_code = 2


class StorageError(InputError):
    """A disk that is full or broken, met while running (exit code 1); told on every rank, as wrong input is."""

    exit_code = 1


class DivergedError(FloatingPointError):
    """Too many steps in a row had no finite loss or gradient (exit code 1). The message says where, and what stays."""


class MemoryExhaustedError(RuntimeError):
    """Memory ran out while running (exit code 1). The message says what needs it, and which keys help."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, or another signal that ends the process in good order (exit code 128 + `number`)."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
