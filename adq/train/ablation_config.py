"""What an ablation file says: a base recipe, and the rows that each change something of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adq.config import from_dict, load_yaml


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: as the table shows it.
        group: rows of a group stand together.
        curve: the line of ``pareto.png`` that the row is a point of, None for none.
        set: changes to the base, nested as in a recipe.
    """

    name: str = ""
    group: str = ""
    curve: str | None = None
    set: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.slug:
            raise ValueError(f"adq: a row needs a name with a letter or a digit, got {self.name!r}")
        for text in (self.name, self.group, self.curve or ""):
            if not text.isprintable():
                raise ValueError(f"adq: names of rows, groups and curves are printed on one line, got {text!r}")
        check_changes(self.set, f"row {self.name!r}")

    @property
    def slug(self) -> str:
        """The name as a part of folder names."""
        return re.sub(r"[^\w.]+", "-", self.name.lower()).strip("-._")


@dataclass(frozen=True)
class Ablation:
    """An ablation file.

    Attributes:
        base: name of a recipe, or a YAML file (beside the ablation's, or relative to the working directory), that every
            row starts from.
        set: changes to it for all rows.
        seeds: each row is run once with each.
        reference: name of the row that differences are taken to.
        rows: what is compared.
    """

    base: str = "digits"
    set: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    reference: str | None = None
    rows: tuple[Row, ...] = ()

    def __post_init__(self) -> None:
        check_changes(self.set, "the ablation")
        check_seeds(self.seeds)
        if not self.rows:
            raise ValueError("adq: an ablation needs rows")
        names = [row.name for row in self.rows]
        taken: dict[str, str] = {}
        for row in self.rows:
            if row.slug in taken:
                raise ValueError(f"adq: rows {taken[row.slug]!r} and {row.name!r} would share the folder {row.slug}")
            taken[row.slug] = row.name
        if self.reference is not None and self.reference not in names:
            raise ValueError(f"adq: the reference {self.reference!r} is none of the rows: {', '.join(names)}")


def check_changes(changes: Any, where: str) -> None:
    """Raise ValueError unless it is a mapping that leaves seed and output alone."""
    if not isinstance(changes, Mapping):
        raise ValueError(f"adq: set of {where} must be a mapping, got {changes!r}")
    taken = {"seed", "output"} & set(changes)
    if taken:
        raise ValueError(f"adq: {where} sets {taken.pop()}, which adq ablate chooses itself")


def check_seeds(seeds: Any) -> None:
    """Raise ValueError unless ``seeds`` are different whole numbers, at least one and none negative."""
    numbers = isinstance(seeds, tuple) and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not numbers or not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"adq: seeds must be different whole numbers, got {seeds!r}")


def read_ablation(path: str | Path) -> Ablation:
    """The ablation in a YAML file.

    Raises:
        FileNotFoundError, ValueError: no such file; an unknown key or a wrong value, with its place.
    """
    values = load_yaml(path)
    rows = values.get("rows", [])
    if not isinstance(rows, list):
        raise ValueError(f"adq: rows must be a list, got {rows!r}")
    parsed = tuple(from_dict(Row, row, where=_place(index, row)) for index, row in enumerate(rows))
    ablation = from_dict(Ablation, {**values, "rows": parsed})
    beside = Path(path).parent / ablation.base
    return replace(ablation, base=str(beside)) if beside.is_file() else ablation


def _place(index: int, row: Any) -> str:
    name = row.get("name") if isinstance(row, Mapping) else None
    return f"rows[{index}]" + (f" ({name})" if name else "")
