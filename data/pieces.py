"""How files are cut into pieces of work: a piece of text becomes one shard, in one process.

A file is read in *spans*, and spans of about PIECE_BYTES of text together make a *piece*. Where a
piece begins depends on the files alone, never on the number of processes. A span ends with a
document, except in a .txt file that is a single document, which is cut where no token of the GPT-2
split pattern can lie across."""

import mmap
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from data.documents import DocumentLayout, Span, documents, separator_line
from data.parquet import open_parquet, row_groups
from data.rows import BadRow, PieceOfText, Text, skip_or_refuse
from data.source_files import File, mapped

# Large enough that a shard is worth a file, small enough that a process holds its text and tokens.
PIECE_BYTES = 2**24

# The newline before a character that is not white space begins a token of its own whatever stands
# before it, so text may be cut there. Lead bytes c2, e1, e2 and e3 are left out: some of the
# characters that they begin are white space.
SAFE_CUT = re.compile(rb"(?=\n[!-~\xc3-\xe0\xe4-\xf4])")
LINE_END = re.compile(rb"\n")

# A stretch of a file: the bytes (of .parquet: rows) from a start to a stop.
Stretch = tuple[File, int, int]


@dataclass(frozen=True, kw_only=True)
class Piece(PieceOfText):
    """Spans of files whose documents become a shard."""

    spans: tuple[Span, ...]
    layout: DocumentLayout

    def texts(self, skipped: list[str] | None = None) -> Iterator[Text]:
        """Yields everything in the piece, in order.

        Args:
            skipped: with bad_rows=skip, the rows that cannot be read are appended to it

        Raises:
            ValueError: a row cannot be read; the error names the file and the line
        """
        for span in self.spans:
            for position, text in documents(span, self.layout):
                if isinstance(text, BadRow):
                    skip_or_refuse(text, self.bad_rows, skipped)
                    continue
                part = self.part_of(span.file.name, position)
                # All parts of a document that is a whole file share the position 0.
                place = position or span.start
                yield Text(part, text, span.opens, span.closes, span.file.path, place)


def pack_spans(
    stretches: Iterable[Stretch], layout: DocumentLayout
) -> list[tuple[tuple[Span, ...], int]]:
    """Returns the spans of stretches, put together as long as they stay within PIECE_BYTES: the
    spans of each piece, and about the bytes of their text."""
    packs: list[list[Span]] = []
    sizes: list[int] = []
    for stretch in stretches:
        for span, size in spans(*stretch, layout):
            if not packs or sizes[-1] + size > PIECE_BYTES:
                packs.append([])
                sizes.append(0)
            packs[-1].append(span)
            sizes[-1] += size
    return [(tuple(pack), size) for pack, size in zip(packs, sizes, strict=True)]


def extent(file: File) -> int:
    """Returns the length of a file: rows of .parquet, else bytes."""
    if not file.path.endswith(".parquet"):
        return file.size
    num_rows: int = open_parquet(file.path).metadata.num_rows
    return num_rows


def spans(file: File, start: int, stop: int, layout: DocumentLayout) -> Iterator[tuple[Span, int]]:
    """Yields (span, about the bytes of its text) that cover start to stop of a file in stretches of
    about PIECE_BYTES."""
    if start == stop:
        return
    if file.path.endswith(".parquet"):
        yield from _parquet_spans(file, start, stop)
        return
    is_one_document = file.path.endswith(".txt") and layout.separator is None
    boundary = _boundary(file, layout)
    begin = start
    with mapped(file.path) as view:
        while begin < stop:
            match = boundary.search(view, begin + PIECE_BYTES, stop)
            end = match.end() if match else stop
            opens = begin == start or not is_one_document
            closes = end == stop or not is_one_document
            yield Span(file, begin, end, opens, closes), end - begin
            begin = end


def _parquet_spans(file: File, start: int, stop: int) -> Iterator[tuple[Span, int]]:
    """Yields a span for each row group: a group is compressed as a whole."""
    for begin, end, num_bytes in row_groups(file.path):
        low = max(begin, start)
        high = min(end, stop)
        if low < high:
            yield Span(file, low, high), num_bytes * (high - low) // (end - begin)


def _boundary(file: File, layout: DocumentLayout) -> re.Pattern[bytes]:
    """Returns the pattern after which a .txt or .jsonl file may be cut."""
    if not file.path.endswith(".txt"):
        return LINE_END
    return SAFE_CUT if layout.separator is None else separator_line(layout)


# Holding out the tail


def cut_tail(
    whole: list[Stretch], fraction: float, layout: DocumentLayout
) -> tuple[list[Stretch], list[Stretch]]:
    """Returns the stretches of files before and after the point where the last `fraction` of all of
    them begins.

    The point is moved back to the start of a character in .txt (nanoGPT cuts there too), on to the
    next line in .jsonl. Raises ValueError for .parquet beside other files."""
    if len({file.path.endswith(".parquet") for file, _, _ in whole}) > 1:
        raise ValueError(
            "data.validation_split=tail cannot weigh rows of .parquet against bytes of other files;"
            " name the set in data.validation"
        )
    point = int(sum(stop for _, _, stop in whole) * (1 - fraction))
    before = []
    after = []
    for file, start, stop in whole:
        # The point counts from the beginning of this file, then of the next.
        cut = min(max(point, 0), stop)
        point -= stop
        if 0 < cut < stop and not file.path.endswith(".parquet"):
            with mapped(file.path) as view:
                cut = align_cut(view, cut, layout if file.path.endswith(".txt") else None)
        before.append((file, start, cut))
        after.append((file, cut, stop))
    # The share may be smaller than the last row, or hit the white space behind it.
    if all(is_blank(*stretch) for stretch in after):
        hold_out_the_last_row(before, after)
    return before, after


def is_blank(file: File, start: int, stop: int) -> bool:
    """Returns whether a stretch of a file holds nothing but white space; a long one does not."""
    if start == stop or stop - start > 2**20 or file.path.endswith(".parquet"):
        return start == stop
    with mapped(file.path) as view:
        return not view[start:stop].strip()


def hold_out_the_last_row(before: list[Stretch], after: list[Stretch]) -> None:
    """Moves the last row of .jsonl files from the stretches before to those after."""
    # The last file with text has the last row.
    for index, (file, start, stop) in reversed([*enumerate(before)]):
        if start < stop and file.path.endswith(".jsonl"):
            with mapped(file.path) as view:
                end = stop
                while end > start and view[end - 1 : end].isspace():
                    end -= 1
                cut = view.rfind(b"\n", 0, end) + 1
            # The only row of all files stays where it is trained on.
            if cut > start or any(begin < end for _, begin, end in before[:index]):
                before[index] = (file, start, cut)
                after[index] = (file, cut, stop)
            return


def align_cut(view: mmap.mmap, cut: int, layout: DocumentLayout | None) -> int:
    """Returns the place nearest to `cut` where text may be parted, as `cut_tail` says: never within
    a separator line.

    Args:
        view: the bytes of a file
        cut: a byte of it
        layout: how documents lie in a .txt file; None for .jsonl
    """
    if layout is None:
        return view.find(b"\n", cut - 1) + 1 or len(view)
    # Bytes 10xxxxxx go on with a character of UTF-8.
    while view[cut] & 0xC0 == 0x80:
        cut -= 1
    if layout.separator is not None:
        match = separator_line(layout).match(view, view.rfind(b"\n", 0, cut) + 1)
        cut = match.end() if match else cut
    return cut
