"""Texts of .parquet files, and of the Arrow columns that `datasets` makes of any file."""

from collections.abc import Iterator
from typing import Any

from data.rows import SET_FIELD, BadRow, located


def open_parquet(path: str) -> Any:
    """Opens a .parquet file. Raises ValueError for a file that is none."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"{path}: not a parquet file ({reason}); get it again or remove it"
        ) from None


def row_groups(path: str) -> Iterator[tuple[int, int, int]]:
    """Yields the row groups of a file: the first row, the row after the last, and the bytes."""
    metadata = open_parquet(path).metadata
    end = 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        begin = end
        end = begin + group.num_rows
        yield begin, end, group.total_byte_size


def parquet_documents(
    path: str, start: int, stop: int, field: str
) -> Iterator[tuple[int, str | BadRow]]:
    """Yields (row, text) of rows start to stop of a file. Raises ValueError for a file whose field
    is missing or holds no text."""
    parquet = open_parquet(path)
    if field not in parquet.schema_arrow.names:
        # The user sees what there is to choose from.
        columns = ", ".join(parquet.schema_arrow.names)
        raise ValueError(
            f"{path}: no field {field!r}; set data.field to the one that holds the text, of"
            f" {columns}"
        )
    # Row groups follow one another, and only their numbers of rows are known.
    end = 0
    for group in range(parquet.metadata.num_row_groups):
        begin = end
        end = begin + parquet.metadata.row_group(group).num_rows
        # Other groups need not be decompressed.
        if begin < stop and end > start:
            for row, text in enumerate(group_texts(parquet, group, field, path), begin):
                if start <= row < stop:
                    yield row, located(text, f"{path}: row {row}")


def group_texts(parquet: Any, group: int, field: str, path: str) -> Iterator[str | BadRow]:
    """Yields the texts of a row group, or what is wrong with them."""
    for batch in readable_batches(parquet, group, field, path):
        yield from column_texts(batch.column(0), field, path)


def readable_batches(parquet: Any, group: int, field: str, path: str) -> Iterator[Any]:
    """Yields the batches of a row group. Raises ValueError with the file where what is compressed
    in it is damaged."""
    import pyarrow

    try:
        yield from parquet.iter_batches(batch_size=1024, row_groups=[group], columns=[field])
    except (pyarrow.ArrowException, OSError) as error:
        # An error of the disk has a number, and is given its own remedy elsewhere.
        if getattr(error, "errno", None):
            raise
        reason = str(error).splitlines()[0].rstrip(". ")
        raise ValueError(
            f"{path}: row group {group} is damaged ({reason}); get the file again"
        ) from None


def column_texts(column: Any, field: str, path: str) -> list[str | BadRow]:
    """Returns the texts of a column of Arrow, or what is wrong with them. Raises ValueError for a
    column of another type."""
    import pyarrow
    import pyarrow.types as types

    # Repeated texts may be stored once, and numbered.
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    is_bytes = types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
    if not (is_text or is_bytes or types.is_null(kind)):
        raise ValueError(f"{path}: data.field={field} holds {kind}, not text; {SET_FIELD}")
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        # Arrow does not check UTF-8. As bytes, each row can be checked by itself.
        values = column.cast(pyarrow.large_string()).cast(pyarrow.large_binary()).to_pylist()
    return [value if isinstance(value, str) else decode_value(value, field) for value in values]


def decode_value(value: bytes | None, field: str) -> str | BadRow:
    """Returns the text that bytes are, or what is wrong with them."""
    if value is None:
        return BadRow(f"has no text in field {field!r}: it is null")
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        return BadRow(f"is not UTF-8 in field {field!r} (byte {error.start} of the text)")
