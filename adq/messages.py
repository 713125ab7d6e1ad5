"""Errors in words: lists that are cut, and what another library's error says first."""

from __future__ import annotations

from collections.abc import Sequence


def listed(problems: Sequence[str], between: str = "; ", most: int = 5) -> str:
    """Problems, or names, as one line, cut after ``most``."""
    more = f" and {len(problems) - most} more" if len(problems) > most else ""
    return between.join(problems[:most]) + more


def first_line(error: BaseException) -> str:
    """What an error says first, with what a colon at its end announces or the first item of a list that follows; of one
    that says nothing, its name.
    """
    said: list[str] = []
    for line in filter(None, map(str.strip, str(error).splitlines())):
        if said and not said[-1].endswith(":") and not (len(said) == 1 and line.startswith("- ")):
            break
        said.append(line)
    return " ".join(said) or type(error).__name__
