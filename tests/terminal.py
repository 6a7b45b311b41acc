"""What is left on a terminal of all that was written to it."""

from __future__ import annotations

import re


def screen(written: str) -> list[str]:
    """What a terminal shows in the end; a small one of ours, which knows what bars need: \\r, \\n and one line up."""
    rows, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[A|\r|\n|[^\x1b\r\n]+", written):
        if part == "\x1b[A":
            row -= 1
        elif part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            rows += [""] * (row == len(rows))
        else:
            rows[row] = f"{rows[row]:<{column}}"[:column] + part + rows[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in rows]
