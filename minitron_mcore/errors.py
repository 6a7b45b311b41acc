"""The exceptions whose message is all that a user has to see."""


class InputError(ValueError):
    """Wrong input (exit code 2): what was given, the rule it breaks, and what to do. `str` is the sentence.

    key: the recipe's key, by its whole name as in `distill.top_k`; "" where no key is at fault.
    value: what was given; None: it is not shown, as where nothing was given.
    rule: what is wrong; it goes on after `key=value`, as in "must be at least 1".
    remedy: what to do, as in "raise it, or leave it out"; "" where the rule says it.
    """

    exit_code = 2

    def __init__(self, key: str, value: object, rule: str, remedy: str = "") -> None:
        super().__init__(key, value, rule, remedy)
        self.key, self.value, self.rule, self.remedy = key, value, rule, remedy

    def __str__(self) -> str:
        return in_words(self)

    def under(self, section: str) -> "InputError":
        """The same error with its key inside `section`, as where `hidden_size` was read from `model`."""
        return type(self)(f"{section}.{self.key}".rstrip("."), self.value, self.rule, self.remedy)

    def found_in(self, place: object) -> "InputError":
        """The same error, of what was read from the file or folder `place`."""
        return type(self)(self.key, self.value, f"in {place} {self.rule}", self.remedy)


def in_words(error: InputError) -> str:
    """The one sentence a user sees: `key=value rule: remedy`."""
    subject = error.key if error.value is None else f"{error.key}={shown(error.value)}".removeprefix("=")
    sentence = f"{subject} {error.rule}".strip()
    return printable(f"{sentence}: {error.remedy}" if error.remedy else sentence)


def shown(value: object) -> str:
    """A value as a recipe writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {shown(entry)}" for name, entry in value.items()) + "}"
    return "null" if value is None else str(value)


def printable(text: str) -> str:
    """Without what would break a sentence, or is a terminal's command, as a stranger's file may have it."""
    return text if text.isprintable() else "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


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
