"""Tables and counts for the console and for Markdown. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def table(
    rows: Sequence[Sequence[object]], header: Sequence[str] = (), *, left: Collection[int] = (0,), indent: str = ""
) -> str:
    """Columns as wide as their widest cell, two spaces apart; those of `left` are aligned left, the others right."""
    lines = [[str(cell) for cell in row] for row in ([header] if header else []) + list(rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        indent
        + "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def counted(number: int, what: str) -> str:
    """1, "shape" -> "1 shape"; 1234 -> "1,234 shapes"; 2, "microbatch" -> "2 microbatches"."""
    ending = "es" if what.endswith(("tch", "sh", "ss", "x")) else "s"
    return f"{number:,} {what}{'' if number == 1 else ending}"


def markdown(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """A table in Markdown; header cells may be blank."""
    lines = ["|" + "|".join(f" {cell} " if cell else " " for cell in map(str, line)) + "|" for line in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])
