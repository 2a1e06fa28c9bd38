"""Where text comes from: the files of a corpus, the documents in them, and which of those are held
out.

A file is read in *spans*, and spans of about PIECE_BYTES of text together make a *piece*: what one
process turns into one shard. Where a piece begins depends on the files alone, never on the number
of processes. A span ends with a document, except in a .txt file that is a single document, which is
cut where no token of the GPT-2 split pattern can lie across."""

import glob
import hashlib
import json
import mmap
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from conf.key import expand
from conf.text import DataConfig
from data.files import open_regular

# Large enough that a shard is worth a file, small enough that a process holds its text and tokens.
PIECE_BYTES = 2**24
SUFFIXES = (".txt", ".jsonl", ".parquet")
NOT_IN_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings"}

BOM = "\ufeff"  # what some programs put at the beginning of a text in UTF-8

# The newline before a character that is not white space begins a token of its own whatever stands
# before it, so text may be cut there. Lead bytes c2, e1, e2 and e3 are left out: some of the
# characters that they begin are white space.
SAFE_CUT = rb"(?=\n[!-~\xc3-\xe0\xe4-\xf4])"


class File(NamedTuple):
    path: str
    name: (
        str  # the path below the folder that the source's files share, so the same on every machine
    )
    size: int
    mtime_ns: int


class Span(NamedTuple):
    """Bytes (of .parquet: rows) start to stop of a file; `opens` and `closes`: whether a document
    begins and ends there."""

    file: File
    start: int
    stop: int
    opens: bool = True
    closes: bool = True


class NoText(ValueError):
    """There is no text where a key says it is."""


class EmptySplit(ValueError):
    """Holding out documents leaves a part without any."""


class Layout(NamedTuple):
    """How documents lie in files: DataConfig's `field` and `separator`."""

    field: str
    separator: str | None


class BadRow(NamedTuple):
    """A row, or a document between separators, that cannot be read: its file, place and problem,
    and what a user can do."""

    problem: str
    remedy: str = "mend or remove it"


class Text(NamedTuple):
    """A document, or a part of one where `opens` or `closes` is false, and the part of the corpus
    that it belongs to."""

    part: str
    text: str
    opens: bool
    closes: bool
    file: str  # where it was read
    position: int  # byte (.parquet and streams: row) of that file

    @property
    def place(self) -> str:
        """The file and line, or row, where the text begins."""
        return f"{self.file}: {name_position(self.file, self.position)}"


@dataclass(frozen=True)
class Piece:
    """Spans whose documents become shard `index` of `part`, but for the share `fraction` of them
    that go to `held_out`."""

    part: str
    index: int
    spans: tuple[Span, ...]
    layout: Layout
    held_out: str | None
    fraction: float
    num_bytes: int  # of text, about
    bad_rows: str  # as in DataConfig

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.part,) if self.held_out is None else (self.part, self.held_out)

    def texts(self, skipped: list[str] | None = None) -> Iterator[Text]:
        """Everything in the piece, in order. Raises ValueError that names the file and the line for
        what cannot be read; with bad_rows=skip, rows that cannot are appended to `skipped`."""
        for span in self.spans:
            for position, text in documents(span, self.layout):
                if isinstance(text, BadRow):
                    skip(text, self.bad_rows, skipped)
                    continue
                held_out = self.held_out is not None and is_held_out(
                    span.file.name, position, self.fraction
                )
                part = self.held_out if held_out and self.held_out else self.part
                yield Text(
                    part,
                    text,
                    span.opens,
                    span.closes,
                    span.file.path,
                    span.start if position == 0 else position,
                )


class TextCorpus:
    """The text that a DataConfig names: its files, their split into parts, and the pieces of those.

    A part is "train/<source>" or "validation/<set>". Without named validation sets each source
    gives up a share of its own text, as the set "validation", or under the source's name if there
    are several.

    Where each document is a whole file and chance would hold out none of them, the tail is held
    out; `warnings` says so.

    Raises ValueError for files of another kind, and NoText where there are none.
    """

    def __init__(self, data: DataConfig) -> None:
        self.data = data
        self.split = data.validation_split
        self.warnings: list[str] = []
        self.layout = Layout(data.field, data.separator if data.source == "text" else None)
        self.named: dict[str, list[File]] = {}
        self.weights: dict[str, float] | None = None
        self.stdlib_hash: str | None = None
        if data.source == "stdlib":
            self.sources = {"stdlib": stdlib_files()}
            self.stdlib_hash = content_hash(self.sources["stdlib"])
        else:
            sources, validation = data.sources or {}, data.validation or {}
            if (data.path is None) == (not sources):
                raise ValueError(
                    f"data.path={data.path} with {len(sources)} data.sources; give the files to"
                    " train on in one of the two"
                )
            if not isinstance(validation, dict):
                raise ValueError(
                    f"data.validation={validation} has no names; write data.validation='{{NAME:"
                    " FILES}'"
                )
            paths = (
                {"text": ("data.path", data.path)}
                if data.path is not None
                else {
                    name: (f"data.sources.{name}.path", source.path)
                    for name, source in sources.items()
                }
            )
            self.sources = {name: find_files(key, path) for name, (key, path) in paths.items()}
            self.named = {
                name: find_files(f"data.validation.{name}", path)
                for name, path in validation.items()
            }
            self.weights = {name: source.weight for name, source in sources.items()} or None
        for name in [*self.sources, *self.named]:
            if not re.fullmatch(r"[\w.+-]+", name):
                raise ValueError(
                    f"{name!r} in data.sources or data.validation names a folder; use letters,"
                    " digits and _ . + - only"
                )
        if not self.named and self.split == "documents":
            self._check_whole_files()
        self._check_separator()

    @property
    def files(self) -> list[File]:
        """Every file of the corpus, those of validation sets last; none where the content is known
        without."""
        groups = (self.sources, self.named) if self.stdlib_hash is None else ()
        return [file for group in groups for files in group.values() for file in files]

    @property
    def identity(self) -> dict[str, Any]:
        """What the corpus is, by the names, sizes and times of its files."""
        return self.identify(lambda file: file[1:])

    def identify(self, describe: Callable[[File], Any]) -> dict[str, Any]:
        """Returns what the corpus is, each file as it is described; two of one identity have the
        same shards."""
        content: Any = self.stdlib_hash
        if content is None:
            content = [
                {name: [describe(file) for file in files] for name, files in group.items()}
                for group in (self.sources, self.named)
            ]
        split = None if self.named else [self.data.validation_fraction, self.split]
        return {
            "source": self.data.source,
            "content": content,
            "layout": list(self.layout),
            "split": split,
        }

    def hold_out_the_tail(self, reason: str) -> None:
        """Holds out the end of the text instead of random documents."""
        self.split = "tail"
        self.warnings.append(
            f"{reason}, so the tail of the text is held out, as data.validation_split=tail does"
        )

    def held_out(self, source: str) -> str:
        """The part that gets the held-out text of a source."""
        return f"validation/{source if len(self.sources) > 1 else 'validation'}"

    def pieces(self, folder: Path | None = None) -> list[Piece]:
        """All pieces of all parts, in order. They do not depend on the folder of the shards; those
        of streamed text do."""
        data, pieces = self.data, []
        for name, files in self.sources.items():
            part, held_out, whole = (
                f"train/{name}",
                self.held_out(name),
                [(file, 0, extent(file)) for file in files],
            )
            if self.named:
                pieces += self._pack(part, whole)
            elif self.split == "documents":
                pieces += self._pack(part, whole, held_out)
            else:
                before, after = cut_tail(whole, data.validation_fraction, self.layout)
                pieces += self._pack(part, before) + self._pack(held_out, after)
        for name, files in self.named.items():
            pieces += self._pack(f"validation/{name}", [(file, 0, extent(file)) for file in files])
        return pieces

    def training_texts(self, source: str) -> Iterator[str]:
        part = f"train/{source}"
        return (
            text.text
            for piece in self.pieces()
            if piece.part == part
            for text in piece.texts()
            if text.part == part
        )

    def leaks(self, digests: dict[str, str]) -> dict[str, str]:
        """Returns a line for each validation part with a file that holds the bytes of a training
        file, given the digests of files by path."""
        found = {}
        trained_on = (
            {
                digests[file.path]: file.path
                for files in self.sources.values()
                for file in files
                if file.size
            }
            if self.named
            else {}
        )
        for name, files in self.named.items():
            for file in files:
                if other := trained_on.get(digests[file.path]):
                    found[f"validation/{name}"] = (
                        f"{file.path} of data.validation.{name} holds the same bytes as {other},"
                        " which is trained on"
                    )
        return found

    def _pack(
        self, part: str, stretches: Iterable[tuple[File, int, int]], held_out: str | None = None
    ) -> list[Piece]:
        """The pieces of (file, start, stop): spans are put together as long as they stay within
        PIECE_BYTES."""
        packs: list[list[Span]] = []
        sizes: list[int] = []
        for span, size in (
            spanned for stretch in stretches for spanned in spans(*stretch, self.layout)
        ):
            if not packs or sizes[-1] + size > PIECE_BYTES:
                packs.append([])
                sizes.append(0)
            packs[-1].append(span)
            sizes[-1] += size
        fraction = self.data.validation_fraction
        bad_rows = self.data.bad_rows
        return [
            Piece(part, i, tuple(pack), self.layout, held_out, fraction, sizes[i], bad_rows)
            for i, pack in enumerate(packs)
        ]

    def _check_separator(self) -> None:
        """Warns of a separator that the text does not seem to hold, as a misspelt one."""
        files = [file for files in self.sources.values() for file in files]
        texts = [file.path for file in files if file.path.endswith(".txt")][:16]
        if self.layout.separator is None or not texts:
            return
        line = separator_line(self.layout)
        for path in texts:
            with open_regular(path) as stream:
                if line.search(stream.read(PIECE_BYTES)):
                    return
        self.warnings.append(
            f"data.separator={self.layout.separator!r} is no line of the text, so that each file is"
            f" one document (seen: the first {PIECE_BYTES >> 20} MB of {len(texts)} files)"
        )

    def _check_whole_files(self) -> None:
        """Holds out the tail where each document is a whole file and chance holds out none of them,
        or all."""
        for name, files in self.sources.items():
            if self.layout.separator is None and all(file.path.endswith(".txt") for file in files):
                num_held_out = sum(
                    is_held_out(file.name, 0, self.data.validation_fraction) for file in files
                )
                if num_held_out in (0, len(files)):
                    part = self.held_out(name) if num_held_out == 0 else f"train/{name}"
                    return self.hold_out_the_tail(empty_split(part, len(files), self.data))
        return None


def empty_split(part: str, num_documents: int, data: DataConfig) -> str:
    """Returns what happened where holding out text leaves a part without any."""
    return (
        f"data.validation_fraction={data.validation_fraction} of {num_documents}"
        f" document{'s' * (num_documents != 1)} leaves {part} empty"
    )


def skip(row: BadRow, bad_rows: str, skipped: list[str] | None) -> None:
    """Notes a row that cannot be read. Raises ValueError unless such rows are to be skipped."""
    if bad_rows == "error":
        raise ValueError(
            f"{row.problem}; {row.remedy}, or set data.bad_rows=skip to leave such rows out"
        )
    if skipped is not None:
        skipped.append(row.problem)


def is_held_out(name: str, position: int, fraction: float) -> bool:
    """Whether the document at a byte or row of a file is held out: a hash decides, alike on every
    machine and in every run."""
    return (
        int.from_bytes(
            hashlib.blake2b(f"{name}\0{position}".encode(), digest_size=8).digest(), "little"
        )
        < fraction * 2**64
    )


# Files


def find_files(key: str, paths: Any, suffixes: tuple[str, ...] = SUFFIXES) -> list[File]:
    """Returns the files of a path, glob or list of them; those of a glob or below a folder in
    alphabetical order, each file once.

    Raises ValueError, naming the key, for paths that are no text or of another kind, and NoText
    where there is nothing."""
    patterns = (
        [paths] if isinstance(paths, str) else paths if isinstance(paths, (list, tuple)) else []
    )
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"{key}={paths} names no files; give a file, a glob or a list of them")
    found: list[str] = []
    for pattern in patterns:
        path = os.path.abspath(expand(key, pattern))
        matches = (
            [path] if os.path.exists(path) else sorted(glob.glob(as_glob(path), recursive=True))
        )
        files = [match for match in matches if os.path.isfile(match)]
        if not files:
            files = sorted(file for match in matches for file in files_below(match, suffixes))
        if not files:
            kinds = ", ".join(suffixes)
            if matches:
                raise NoText(
                    f"{key}={pattern} holds no {kinds} file; give a file, a folder of such, or a"
                    f" glob like FOLDER/*{suffixes[0]}"
                )
            missing = path.removeprefix(there(path))
            brackets = "; [ ] in a name are written [[] and []]" if "[" in missing else ""
            raise NoText(
                f"{key}={pattern} matches no file; give a file or a glob like"
                f" FOLDER/*{suffixes[0]}{brackets}"
            )
        found += files
    if wrong := [path for path in found if not path.endswith(suffixes)]:
        raise ValueError(f"{key}={wrong[0]} is of no known kind; give {', '.join(suffixes)} files")
    return list_files(
        list(dict.fromkeys(found)), os.path.commonpath([os.path.dirname(path) for path in found])
    )


def as_glob(path: str) -> str:
    """Returns a pattern in which the folders that are there stand for themselves, whatever
    characters they have in their names."""
    literal = there(path)
    return glob.escape(literal) + path.removeprefix(literal)


def there(path: str) -> str:
    """Returns the beginning of a path that is there, up to a whole name."""
    while path and not os.path.exists(path):
        path = path.rpartition("/")[0]
    return path


def files_below(folder: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    """Yields the files of the kinds below a folder, but hidden ones; links are followed, each
    folder once."""
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        folders[:] = (
            sorted(name for name in folders if not name.startswith(".")) if real not in seen else []
        )
        if real not in seen:
            paths = (
                os.path.join(root, name)
                for name in names
                if name.endswith(suffixes) and not name.startswith(".")
            )
            yield from (path for path in paths if os.path.isfile(path))
        seen.add(real)


def stdlib_files() -> list[File]:
    """The .py files of the running Python's standard library, without its tests, installed packages
    and character tables."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = []
    for folder, subfolders, names in os.walk(root):
        # not descended into: site-packages may hold a hundred times as much
        subfolders[:] = set(subfolders) - NOT_IN_STDLIB
        paths += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    return list_files(sorted(paths), str(root))


def list_files(paths: list[str], root: str) -> list[File]:
    named = (
        (path, os.path.relpath(path, root).replace(os.sep, "/"), os.stat(path)) for path in paths
    )
    return [File(path, name, stat.st_size, stat.st_mtime_ns) for path, name, stat in named]


def content_hash(files: list[File]) -> str:
    """sha256 over names and contents."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.size}\0".encode() + Path(file.path).read_bytes())
    return digest.hexdigest()


def digest(file: File) -> str:
    """Returns the sha256 (hex) of a file's bytes."""
    with open_regular(file.path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# Spans


def extent(file: File) -> int:
    """Length of a file: rows of .parquet, else bytes."""
    if not file.path.endswith(".parquet"):
        return file.size
    num_rows: int = open_parquet(file.path).metadata.num_rows
    return num_rows


def spans(file: File, start: int, stop: int, layout: Layout) -> Iterator[tuple[Span, int]]:
    """(span, bytes of text about) that cover start to stop of a file in stretches of about
    PIECE_BYTES."""
    if start == stop:
        return
    if file.path.endswith(".parquet"):
        metadata = open_parquet(file.path).metadata
        end = 0
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            begin, end = end, end + group.num_rows
            low, high = max(begin, start), min(end, stop)
            if low < high:
                yield Span(file, low, high), group.total_byte_size * (high - low) // group.num_rows
        return
    is_one_document = file.path.endswith(".txt") and layout.separator is None
    boundary = (
        re.compile(SAFE_CUT)
        if is_one_document
        else separator_line(layout)
        if file.path.endswith(".txt")
        else re.compile(rb"\n")
    )
    begin = start
    with mapped(file.path) as view:
        while begin < stop:
            match = boundary.search(view, begin + PIECE_BYTES, stop)
            end = match.end() if match else stop
            yield (
                Span(
                    file,
                    begin,
                    end,
                    begin == start or not is_one_document,
                    end == stop or not is_one_document,
                ),
                end - begin,
            )
            begin = end


def cut_tail(
    whole: list[tuple[File, int, int]], fraction: float, layout: Layout
) -> tuple[list[tuple[File, int, int]], list[tuple[File, int, int]]]:
    """Stretches of files before and after the point where the last `fraction` of all of them
    begins.

    The point is moved back to the start of a character in .txt (nanoGPT cuts there too), on to the
    next line in .jsonl."""
    if len({file.path.endswith(".parquet") for file, _, _ in whole}) > 1:
        raise ValueError(
            "data.validation_split=tail cannot weigh rows of .parquet against bytes of other files;"
            " name the set in data.validation"
        )
    point = int(sum(stop for _, _, stop in whole) * (1 - fraction))
    before, after = [], []
    for file, start, stop in whole:
        cut = min(max(point, 0), stop)
        point -= stop
        if 0 < cut < stop and not file.path.endswith(".parquet"):
            with mapped(file.path) as view:
                cut = align(view, cut, layout if file.path.endswith(".txt") else None)
        before.append((file, start, cut))
        after.append((file, cut, stop))
    if all(is_blank(*stretch) for stretch in after):
        hold_out_the_last_row(before, after)
    return before, after


def is_blank(file: File, start: int, stop: int) -> bool:
    """Returns whether a stretch of a file holds nothing but white space; a long one does not."""
    if start == stop or stop - start > 2**20 or file.path.endswith(".parquet"):
        return start == stop
    with mapped(file.path) as view:
        return not view[start:stop].strip()


def hold_out_the_last_row(
    before: list[tuple[File, int, int]], after: list[tuple[File, int, int]]
) -> None:
    """Moves the last row of .jsonl files from the stretches before to those after."""
    for index, (file, start, stop) in reversed([*enumerate(before)]):
        if start < stop and file.path.endswith(".jsonl"):
            with mapped(file.path) as view:
                end = stop
                while end > start and view[end - 1 : end].isspace():
                    end -= 1
                cut = view.rfind(b"\n", 0, end) + 1
            if cut > start or any(begin < end for _, begin, end in before[:index]):
                before[index], after[index] = (file, start, cut), (file, cut, stop)
            return


def align(view: mmap.mmap, cut: int, layout: Layout | None) -> int:
    """The place nearest to `cut` where text may be parted: see `cut_tail`. A separator line is not
    parted; layout None: .jsonl."""
    if layout is None:
        return view.find(b"\n", cut - 1) + 1 or len(view)
    while view[cut] & 0xC0 == 0x80:
        cut -= 1
    if layout.separator is not None:
        match = separator_line(layout).match(view, view.rfind(b"\n", 0, cut) + 1)
        cut = match.end() if match else cut
    return cut


def separator_line(layout: Layout) -> re.Pattern[bytes]:
    assert layout.separator is not None
    return re.compile(
        rb"(?m)^(?:\xef\xbb\xbf)?" + re.escape(layout.separator.encode()) + rb"\r?(?:\n|\Z)"
    )


def mapped(path: str) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


# Documents


def documents(span: Span, layout: Layout) -> Iterator[tuple[int, str | BadRow]]:
    """Yields (byte or row of the file where it begins, text) of the documents that are not empty,
    without a byte-order mark."""
    file = span.file
    if file.path.endswith(".parquet"):
        found = parquet_documents(span, layout.field)
    else:
        with open_regular(file.path) as stream:
            stream.seek(span.start)
            data = stream.read(span.stop - span.start)
        if file.path.endswith(".jsonl"):
            found = jsonl_documents(file, span.start, data, layout.field)
        elif layout.separator is None:
            found = whole_document(span, data)
        else:
            found = separated_documents(file, span.start, data, layout)
    for position, text in found:
        if isinstance(text, str):
            text = text.removeprefix(BOM)
        if text:
            yield position, text


def whole_document(span: Span, data: bytes) -> Iterator[tuple[int, str | BadRow]]:
    """Yields a .txt file, or a part of one: all parts share the position 0. Raises ValueError for a
    part that is not UTF-8, since the others may be elsewhere by now."""
    text = decode(span.file, span.start, data)
    if isinstance(text, BadRow) and not (span.opens and span.closes):
        raise ValueError(f"{text.problem}; {text.remedy}")
    # A mark within the file is a character of its text.
    yield 0, BOM + text if isinstance(text, str) and span.start else text


def separated_documents(
    file: File, start: int, data: bytes, layout: Layout
) -> Iterator[tuple[int, str | BadRow]]:
    """Yields what lies between the separator lines of a part of a .txt file that begins at byte
    `start`."""
    begin = 0
    for match in separator_line(layout).finditer(data):
        if match.start() > begin:
            yield start + begin, decode(file, start + begin, data[begin : match.start()])
        begin = match.end()
    if begin < len(data):
        yield start + begin, decode(file, start + begin, data[begin:])


def decode(file: File, position: int, data: bytes) -> str | BadRow:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = line_number(file.path, position + error.start)
        problem = f"{file.path}: line {line} is not UTF-8 (byte {position + error.start})"
        return BadRow(problem, "convert the file, for example with iconv")


def jsonl_documents(
    file: File, start: int, data: bytes, field: str
) -> Iterator[tuple[int, str | BadRow]]:
    """Yields (byte of its line, text) of each row; `start` is the byte of the file where `data`
    begins."""
    position = start
    for line in data.split(b"\n"):
        if line.strip():
            text = row_text(line, field)
            if isinstance(text, str):
                yield position, text
            else:
                yield (
                    position,
                    BadRow(
                        f"{file.path}: line {line_number(file.path, position)} {text.problem}",
                        text.remedy,
                    ),
                )
        position += len(line) + 1


# Python refuses whole numbers of thousands of digits. They are no text in any case.
ROWS = json.JSONDecoder(parse_int=float)


def json_object(line: bytes) -> dict[str, Any] | BadRow:
    """Returns the object in a line of .jsonl, or what is wrong with it."""
    try:
        row = ROWS.decode(line.decode("utf-8", "surrogatepass").removeprefix(BOM))
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


SET_FIELD = "set data.field to the field that holds the text"


def parquet_documents(span: Span, field: str) -> Iterator[tuple[int, str | BadRow]]:
    """Yields (row, text) of each row of a span. Raises ValueError for a file whose field is missing
    or holds no text."""
    path = span.file.path
    parquet = open_parquet(path)
    if field not in parquet.schema_arrow.names:
        columns = ", ".join(parquet.schema_arrow.names)
        raise ValueError(
            f"{path}: no field {field!r}; set data.field to the one that holds the text, of"
            f" {columns}"
        )
    end = 0
    for group in range(parquet.metadata.num_row_groups):
        begin, end = end, end + parquet.metadata.row_group(group).num_rows
        if end <= span.start or begin >= span.stop:
            continue
        row = begin
        for batch in readable_batches(parquet, group, field, path):
            for text in column_texts(batch.column(0), field, path):
                if span.start <= row < span.stop:
                    yield (
                        row,
                        (
                            BadRow(f"{path}: row {row} {text.problem}", text.remedy)
                            if isinstance(text, BadRow)
                            else text
                        ),
                    )
                row += 1


def readable_batches(parquet: Any, group: int, field: str, path: str) -> Iterator[Any]:
    """Yields the batches of a row group. Raises ValueError with the file where what is compressed
    in it is damaged."""
    import pyarrow

    try:
        yield from parquet.iter_batches(batch_size=1024, row_groups=[group], columns=[field])
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None):  # the disk's, which names its own remedy
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
        values = column.cast(pyarrow.large_string()).cast(pyarrow.large_binary()).to_pylist()
    return [value if isinstance(value, str) else text_of(value, field) for value in values]


def text_of(value: bytes | None, field: str) -> str | BadRow:
    """Returns the text that bytes are, or what is wrong with them."""
    if value is None:
        return BadRow(f"has no text in field {field!r}: it is null")
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        return BadRow(f"is not UTF-8 in field {field!r} (byte {error.start} of the text)")


def open_parquet(path: str) -> Any:
    """Raises ValueError for a file that is not parquet."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(
            f"{path}: not a parquet file ({str(error).splitlines()[0]}); mend or remove it"
        ) from None


def name_position(path: str, position: int) -> str:
    """Returns what a person calls a place in a file: a row of .parquet and of streams, else a
    line."""
    if path.endswith((".txt", ".jsonl", ".py")) and os.path.isfile(path):
        return f"line {line_number(path, position)}"
    return f"row {position}"


def line_number(path: str, position: int) -> int:
    """Returns the line, counted from 1, of a byte of a file."""
    with mapped(path) as view:
        return view[:position].count(b"\n") + 1
