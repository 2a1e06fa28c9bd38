"""The documents in files of text: whole .txt files, stretches of them between separator lines, and
rows of .jsonl and .parquet."""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from data.files import open_regular
from data.parquet import parquet_documents
from data.rows import SET_FIELD, BadRow
from data.source_files import File, line_number

# What some programs put at the beginning of a text in UTF-8.
BYTE_ORDER_MARK = "\ufeff"
# How files begin that are no text, and what to do about them. None of it is UTF-8, or only with
# control characters.
NO_TEXT = {
    b"\x1f\x8b": "is gzipped; unpack it",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd; unpack it",
    b"\xfd7zXZ\0": "is compressed by xz; unpack it",
    b"PK\x03\x04": "is a zip archive; unpack it",
    b"\xff\xfe": "is UTF-16; convert it to UTF-8, for example with iconv",
    b"\xfe\xff": "is UTF-16; convert it to UTF-8, for example with iconv",
}
# Python refuses whole numbers of thousands of digits. They are no text in any case.
ROWS = json.JSONDecoder(parse_int=float)


class DocumentLayout(NamedTuple):
    """How documents lie in files: DataConfig's `field` and `separator`."""

    field: str
    separator: str | None


class Span(NamedTuple):
    """Bytes (of .parquet: rows) start to stop of a file. `opens` and `closes` say whether a
    document begins and ends there."""

    file: File
    start: int
    stop: int
    opens: bool = True
    closes: bool = True


def documents(span: Span, layout: DocumentLayout) -> Iterator[tuple[int, str | BadRow]]:
    """Yields (byte or row of the file where it begins, text) of the documents that are not empty,
    without a byte-order mark."""
    file = span.file
    if file.path.endswith(".parquet"):
        found = parquet_documents(file.path, span.start, span.stop, layout.field)
    else:
        with open_regular(file.path) as stream:
            stream.seek(span.start)
            data = stream.read(span.stop - span.start)
        if span.start == 0:
            refuse_no_text(file.path, data[:4096])
        if file.path.endswith(".jsonl"):
            found = jsonl_documents(file, span.start, data, layout.field)
        elif layout.separator is None:
            found = whole_document(span, data)
        else:
            found = separated_documents(file, span.start, data, layout)
    for position, text in found:
        if isinstance(text, str):
            text = text.removeprefix(BYTE_ORDER_MARK)
        if text:
            yield position, text


def refuse_no_text(path: str, start: bytes) -> None:
    """Raises ValueError for a file whose first bytes show that it holds no text in UTF-8: all of
    its rows would be bad ones."""
    for magic, problem in NO_TEXT.items():
        if start.startswith(magic):
            raise ValueError(f"{path} {problem}")
    # Every second byte of English in UTF-16 is 0. Text may hold a few such bytes.
    if len(start) >= 16 and start.count(0) > len(start) // 4:
        raise ValueError(
            f"{path} is no UTF-8: many of its first bytes are 0, as in UTF-16; convert it, for"
            " example with iconv, or get it again"
        )


# .txt


def separator_line(layout: DocumentLayout) -> re.Pattern[bytes]:
    """Returns the pattern of a line that parts two documents, with the end of that line."""
    assert layout.separator is not None
    return re.compile(
        rb"(?m)^(?:\xef\xbb\xbf)?" + re.escape(layout.separator.encode()) + rb"\r?(?:\n|\Z)"
    )


def has_separator(path: str, layout: DocumentLayout, num_bytes: int) -> bool:
    """Returns whether the first num_bytes bytes of a .txt file hold a separator line."""
    with open_regular(path) as stream:
        return separator_line(layout).search(stream.read(num_bytes)) is not None


def whole_document(span: Span, data: bytes) -> Iterator[tuple[int, str | BadRow]]:
    """Yields a .txt file, or a part of one: all parts share the position 0. Raises ValueError for a
    part that is not UTF-8, since the others may be elsewhere by now."""
    text = decode(span.file, span.start, data)
    if isinstance(text, BadRow) and not (span.opens and span.closes):
        raise ValueError(f"{text.problem}; {text.remedy}")
    if isinstance(text, str) and span.start:
        # Within a file such a mark is a character of the text: `documents` takes this one off.
        text = BYTE_ORDER_MARK + text
    yield 0, text


def separated_documents(
    file: File, start: int, data: bytes, layout: DocumentLayout
) -> Iterator[tuple[int, str | BadRow]]:
    """Yields what lies between the separator lines of a part of a .txt file that begins at byte
    `start`."""
    # The text between two separators is a document, also before the first and after the last.
    begin = 0
    for match in separator_line(layout).finditer(data):
        if match.start() > begin:
            yield start + begin, decode(file, start + begin, data[begin : match.start()])
        begin = match.end()
    if begin < len(data):
        yield start + begin, decode(file, start + begin, data[begin:])


def decode(file: File, position: int, data: bytes) -> str | BadRow:
    """Returns the text of bytes that begin at a position of a file, or what is wrong with them."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = line_number(file.path, position + error.start)
        problem = f"{file.path}: line {line} is not UTF-8 (byte {position + error.start})"
        return BadRow(problem, "convert the file, for example with iconv")


# .jsonl


def jsonl_documents(
    file: File, start: int, data: bytes, field: str
) -> Iterator[tuple[int, str | BadRow]]:
    """Yields (byte of its line, text) of each row; `start` is the byte of the file where `data`
    begins."""
    position = start
    # Lines end with a line feed alone: other line ends may stand within a text.
    for line in data.split(b"\n"):
        if line.strip():
            text = row_text(line, field)
            if isinstance(text, BadRow):
                number = line_number(file.path, position)
                text = BadRow(f"{file.path}: line {number} {text.problem}", text.remedy)
            yield position, text
        position += len(line) + 1


def json_object(line: bytes) -> dict[str, Any] | BadRow:
    """Returns the object in a line of .jsonl, or what is wrong with it."""
    try:
        row = ROWS.decode(line.decode("utf-8", "surrogatepass").removeprefix(BYTE_ORDER_MARK))
    except ValueError:
        return BadRow("is not JSON in UTF-8")
    except RecursionError:
        return BadRow("is nested too deeply to be read")
    return row if isinstance(row, dict) else BadRow("is no object with a text in a field")


def row_text(line: bytes, field: str) -> str | BadRow:
    """Returns the text of a line of .jsonl, or what is wrong with it."""
    row = json_object(line)
    if isinstance(row, BadRow):
        return row
    if field not in row:
        return BadRow(
            f"has no text in field {field!r} (its fields are {', '.join(row)[:200]})", SET_FIELD
        )
    text = row[field]
    if text is None:
        return BadRow(f"has no text in field {field!r}: it is null")
    if not isinstance(text, str):
        return BadRow(f"has no text in field {field!r}: it is of another kind", SET_FIELD)
    # JSON can escape half of a surrogate pair, which no UTF-8 text holds: such a half becomes
    # U+FFFD.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
