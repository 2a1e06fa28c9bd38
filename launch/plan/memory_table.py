"""The memory plan as a table of named tensors: one row a tensor, or some of one kind, that lives at
a moment of a step."""

from collections.abc import Callable, Iterable, Iterator
from math import prod
from typing import NamedTuple


class Row(NamedTuple):
    """One kind of tensor that lives at a moment."""

    part: str  # what it counts as: weights, optimiser, gradients, activations, head, ...
    name: str
    shape: str
    bytes: int


Table = list[Row]
Moment = tuple[str, Table]  # its name: forward, backward, ...


def tensor(part: str, name: str, *shape: int, size: int = 4) -> Table:
    """Returns the table of one kind of tensor, without a row where that has no numbers.

    Args:
        part: what it counts as
        name: what it is, unique within the moment
        shape: numbers along each dimension
        size: bytes of a number
    """
    num_bytes = prod(shape) * size
    if num_bytes <= 0:
        return []
    return [Row(part, name, " x ".join(f"{side:,}" for side in shape) + f", {size} B", num_bytes)]


def total(table: Iterable[Row]) -> int:
    """Returns the bytes of a table."""
    return sum(row.bytes for row in table)


def larger(one: Table, other: Table) -> Table:
    """Returns the table of more bytes, of two that do not live at the same time."""
    return other if total(other) > total(one) else one


def by_part(table: Iterable[Row]) -> dict[str, int]:
    """Returns the bytes of each part, in the order in which they come up."""
    parts: dict[str, int] = {}
    for row in table:
        parts[row.part] = parts.get(row.part, 0) + row.bytes
    return parts


def lines(table: Iterable[Row], size_of: Callable[[float], str]) -> Iterator[str]:
    """Yields the table as a person reads it, the largest tensors first; `size_of` writes bytes."""
    for row in sorted(table, key=lambda row: -row.bytes):
        yield f"  {size_of(row.bytes):>12}  {row.part:20}{row.name:44}{row.shape}"
