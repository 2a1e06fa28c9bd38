"""Where text comes from: the files of a corpus, the documents in them, and which of those are held out.

A file is read in *spans*, and spans of about PIECE_BYTES of text together make a *piece*: what one process turns into
one shard. Where a piece begins depends on the files alone, never on the number of processes. A span ends with a document,
except in a .txt file that is a single document, which is cut where no token of the GPT-2 split pattern can lie across.
"""

import glob
import hashlib
import json
import mmap
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from conf.schema import DataConfig

PIECE_BYTES = 2**24  # large enough that a shard is worth a file, small enough that a process holds its text and tokens easily
SUFFIXES = (".txt", ".jsonl", ".parquet")
NOT_IN_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings"}

# The newline before a character that is not white space begins a token of its own whatever stands before it, so text may be
# cut there. Lead bytes c2, e1, e2 and e3 are left out: some of the characters that they begin are white space.
SAFE_CUT = rb"(?=\n[!-~\xc3-\xe0\xe4-\xf4])"


class File(NamedTuple):
    path: str
    name: str  # the path below the folder that the source's files share, so the same on every machine
    size: int
    mtime_ns: int


class Span(NamedTuple):
    """Bytes (of .parquet: rows) start to stop of a file; `opens` and `closes`: whether a document begins and ends there."""

    file: File
    start: int
    stop: int
    opens: bool = True
    closes: bool = True


class Layout(NamedTuple):
    """How documents lie in files: DataConfig's `field` and `separator`."""

    field: str
    separator: str | None


class Text(NamedTuple):
    """A document, or a part of one where `opens` or `closes` is false, and the part of the corpus that it belongs to."""

    part: str
    text: str
    opens: bool
    closes: bool


@dataclass(frozen=True)
class Piece:
    """Spans whose documents become shard `index` of `part`, but for the share `fraction` of them that go to `held_out`."""

    part: str
    index: int
    spans: tuple[Span, ...]
    layout: Layout
    held_out: str | None
    fraction: float
    num_bytes: int  # of text, about

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.part,) if self.held_out is None else (self.part, self.held_out)

    def texts(self) -> Iterator[Text]:
        """Everything in the piece, in order. Raises ValueError that names the file and the line for what cannot be read."""
        for span in self.spans:
            for position, text in documents(span, self.layout):
                held_out = self.held_out is not None and is_held_out(span.file.name, position, self.fraction)
                yield Text(self.held_out if held_out else self.part, text, span.opens, span.closes)  # type: ignore[arg-type]


class TextCorpus:
    """The text that a DataConfig names: its files, their split into parts, and the pieces of those.

    A part is "train/<source>" or "validation/<set>". Without named validation sets each source gives up a share of its
    own text, as the set "validation", or under the source's name if there are several.

    Raises ValueError for files that are missing or of another kind, and for a split that can be seen to come out empty.
    """

    def __init__(self, data: DataConfig) -> None:
        self.data = data
        self.layout = Layout(data.field, data.separator if data.source == "text" else None)
        self.named: dict[str, list[File]] = {}
        self.weights: dict[str, float] | None = None
        if data.source == "stdlib":
            self.sources = {"stdlib": stdlib_files()}
            content: Any = content_hash(self.sources["stdlib"])
        else:
            sources, validation = data.sources or {}, data.validation or {}
            if (data.path is None) == (not sources):
                raise ValueError(f"data.path={data.path} with {len(sources)} data.sources; give the files to train on in one of the two")
            if not isinstance(validation, dict):
                raise ValueError(f"data.validation={validation} has no names; write data.validation='{{NAME: FILES}}'")
            paths = {"text": ("data.path", data.path)} if data.path is not None else {
                name: (f"data.sources.{name}.path", source.path) for name, source in sources.items()}  # fmt: skip
            self.sources = {name: find_files(key, path) for name, (key, path) in paths.items()}
            self.named = {name: find_files(f"data.validation.{name}", path) for name, path in validation.items()}
            self.weights = {name: source.weight for name, source in sources.items()} or None
            content = [{name: [file[1:] for file in files] for name, files in group.items()} for group in (self.sources, self.named)]
        for name in [*self.sources, *self.named]:
            if not re.fullmatch(r"[\w.+-]+", name):
                raise ValueError(f"{name!r} in data.sources or data.validation names a folder; use letters, digits and _ . + - only")
        split = None if self.named else [data.validation_fraction, data.validation_split]
        self.identity = {"source": data.source, "content": content, "layout": list(self.layout), "split": split}
        if split and data.validation_split == "documents":
            self._check_whole_files()

    def held_out(self, source: str) -> str:
        """The part that gets the held-out text of a source."""
        return f"validation/{source if len(self.sources) > 1 else 'validation'}"

    def pieces(self, folder: Path | None = None) -> list[Piece]:
        """All pieces of all parts, in order. They do not depend on the folder of the shards; those of streamed text do."""
        data, pieces = self.data, []
        for name, files in self.sources.items():
            part, held_out, whole = f"train/{name}", self.held_out(name), [(file, 0, extent(file)) for file in files]
            if self.named:
                pieces += self._pack(part, whole)
            elif data.validation_split == "documents":
                pieces += self._pack(part, whole, held_out)
            else:
                before, after = cut_tail(whole, data.validation_fraction, self.layout)
                pieces += self._pack(part, before) + self._pack(held_out, after)
        for name, files in self.named.items():
            pieces += self._pack(f"validation/{name}", [(file, 0, extent(file)) for file in files])
        return pieces

    def training_texts(self, source: str) -> Iterator[str]:
        part = f"train/{source}"
        return (text.text for piece in self.pieces() if piece.part == part for text in piece.texts() if text.part == part)

    def notes(self) -> list[str]:
        """What a user should know before the text is used: files that are trained and validated on."""
        trained_on = {file.path for files in self.sources.values() for file in files}
        shared = [(file.path, name) for name, files in self.named.items() for file in files if file.path in trained_on]
        return [f"{path} is both in the training text and in data.validation.{name}" for path, name in shared]

    def _pack(self, part: str, stretches: Iterable[tuple[File, int, int]], held_out: str | None = None) -> list[Piece]:
        """The pieces of (file, start, stop): spans are put together as long as they stay within PIECE_BYTES."""
        packs: list[list[Span]] = []
        sizes: list[int] = []
        for span, size in (spanned for stretch in stretches for spanned in spans(*stretch, self.layout)):
            if not packs or sizes[-1] + size > PIECE_BYTES:
                packs.append([])
                sizes.append(0)
            packs[-1].append(span)
            sizes[-1] += size
        fraction = self.data.validation_fraction
        return [Piece(part, i, tuple(pack), self.layout, held_out, fraction, sizes[i]) for i, pack in enumerate(packs)]

    def _check_whole_files(self) -> None:
        """Raises ValueError where each document is a whole file and chance holds out none of them, or all."""
        for name, files in self.sources.items():
            if self.layout.separator is None and all(file.path.endswith(".txt") for file in files):
                num_held_out = sum(is_held_out(file.name, 0, self.data.validation_fraction) for file in files)
                if num_held_out in (0, len(files)):
                    raise ValueError(empty_split(self.held_out(name) if num_held_out == 0 else f"train/{name}", len(files), self.data))


def empty_split(part: str, num_documents: int, data: DataConfig) -> str:
    """What to say when holding out documents leaves a part without any."""
    return (
        f"data.validation_fraction={data.validation_fraction} of {num_documents} document{'s' * (num_documents != 1)} leaves {part} empty; "
        "set data.validation_split=tail, or data.separator if the .txt files hold several documents each, or data.validation"
    )


def is_held_out(name: str, position: int, fraction: float) -> bool:
    """Whether the document at a byte or row of a file is held out: a hash decides, alike on every machine and in every run."""
    return int.from_bytes(hashlib.blake2b(f"{name}\0{position}".encode(), digest_size=8).digest(), "little") < fraction * 2**64


# Files


def find_files(key: str, paths: Any, suffixes: tuple[str, ...] = SUFFIXES) -> list[File]:
    """The files of a path, glob or list of them; a glob's in alphabetical order, each file once. Raises ValueError naming the key."""
    patterns = [paths] if isinstance(paths, str) else paths if isinstance(paths, (list, tuple)) else []
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"{key}={paths} names no files; give a file, a glob or a list of them")
    found: list[str] = []
    for pattern in patterns:
        path = os.path.abspath(os.path.expanduser(pattern))
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        files = [match for match in matches if os.path.isfile(match)]
        if not files:
            problem = "is a folder; write" if matches else "matches no file; give a file or a glob like"
            raise ValueError(f"{key}={pattern} {problem} FOLDER/*{suffixes[0]}")
        found += files
    if wrong := [path for path in found if not path.endswith(suffixes)]:
        raise ValueError(f"{key}={wrong[0]} is of no known kind; give {', '.join(suffixes)} files")
    return list_files(list(dict.fromkeys(found)), os.path.commonpath([os.path.dirname(path) for path in found]))


def stdlib_files() -> list[File]:
    """The .py files of the running Python's standard library, without its tests, installed packages and character tables."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = set(subfolders) - NOT_IN_STDLIB  # not descended into: site-packages may hold a hundred times as much
        paths += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    return list_files(sorted(paths), str(root))


def list_files(paths: list[str], root: str) -> list[File]:
    named = ((path, os.path.relpath(path, root).replace(os.sep, "/"), os.stat(path)) for path in paths)
    return [File(path, name, stat.st_size, stat.st_mtime_ns) for path, name, stat in named]


def content_hash(files: list[File]) -> str:
    """sha256 over names and contents."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.size}\0".encode() + Path(file.path).read_bytes())
    return digest.hexdigest()


# Spans


def extent(file: File) -> int:
    """Length of a file: rows of .parquet, else bytes."""
    if not file.path.endswith(".parquet"):
        return file.size
    num_rows: int = open_parquet(file.path).metadata.num_rows
    return num_rows


def spans(file: File, start: int, stop: int, layout: Layout) -> Iterator[tuple[Span, int]]:
    """(span, bytes of text about) that cover start to stop of a file in stretches of about PIECE_BYTES."""
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
    boundary = re.compile(SAFE_CUT) if is_one_document else separator_line(layout) if file.path.endswith(".txt") else re.compile(rb"\n")
    begin = start
    with mapped(file.path) as view:
        while begin < stop:
            match = boundary.search(view, begin + PIECE_BYTES, stop)
            end = match.end() if match else stop
            yield Span(file, begin, end, begin == start or not is_one_document, end == stop or not is_one_document), end - begin
            begin = end


def cut_tail(whole: list[tuple[File, int, int]], fraction: float, layout: Layout) -> tuple[list[tuple[File, int, int]], list[tuple[File, int, int]]]:
    """Stretches of files before and after the point where the last `fraction` of all of them begins.

    The point is moved back to the start of a character in .txt (nanoGPT cuts there too), on to the next line in .jsonl."""
    if len({file.path.endswith(".parquet") for file, _, _ in whole}) > 1:
        raise ValueError("data.validation_split=tail cannot weigh rows of .parquet against bytes of other files; name the set in data.validation")
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
    return before, after


def align(view: mmap.mmap, cut: int, layout: Layout | None) -> int:
    """The place nearest to `cut` where text may be parted: see `cut_tail`. A separator line is not parted; layout None: .jsonl."""
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
    return re.compile(rb"(?m)^" + re.escape(layout.separator.encode()) + rb"\r?(?:\n|\Z)")


def mapped(path: str) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


# Documents


def documents(span: Span, layout: Layout) -> Iterator[tuple[int, str]]:
    """(byte or row of the file where it begins, text) of the documents that are not empty."""
    file = span.file
    if file.path.endswith(".parquet"):
        yield from parquet_documents(span, layout.field)
        return
    with open(file.path, "rb") as stream:
        stream.seek(span.start)
        data = stream.read(span.stop - span.start)
    if file.path.endswith(".jsonl"):
        yield from jsonl_documents(file, span.start, data, layout.field)
    elif layout.separator is None:
        yield 0, decode(file, span.start, data)  # all parts of the one document share its position
    else:
        begin = 0
        for match in separator_line(layout).finditer(data):
            if match.start() > begin:
                yield span.start + begin, decode(file, span.start + begin, data[begin : match.start()])
            begin = match.end()
        if begin < len(data):
            yield span.start + begin, decode(file, span.start + begin, data[begin:])


def decode(file: File, position: int, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = line_number(file, position + error.start)
        raise ValueError(f"{file.path}: line {line} is not UTF-8 (byte {position + error.start}); convert the file, for example with iconv") from None


def jsonl_documents(file: File, start: int, data: bytes, field: str) -> Iterator[tuple[int, str]]:
    """(byte of its line, text) of each row; `start` is the byte of the file where `data` begins. Raises ValueError for a row without text."""
    position = start
    for line in data.split(b"\n"):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                raise ValueError(f"{file.path}: line {line_number(file, position)} is not JSON in UTF-8; mend or remove it") from None
            text = row.get(field) if isinstance(row, dict) else None
            if not isinstance(text, str):
                problem = f"{line_number(file, position)} has no text in field {field!r}"
                raise ValueError(f"{file.path}: line {problem}; set data.field to the field that holds the text")
            if text:
                # JSON can escape half of a surrogate pair, which no UTF-8 text holds: such a half becomes U+FFFD.
                yield position, text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        position += len(line) + 1


def parquet_documents(span: Span, field: str) -> Iterator[tuple[int, str]]:
    """(row, text) of each row of a span. Raises ValueError for a file without the field, or a row without text."""
    parquet = open_parquet(span.file.path)
    if field not in parquet.schema_arrow.names:
        columns = ", ".join(parquet.schema_arrow.names)
        raise ValueError(f"{span.file.path}: no field {field!r}; set data.field to the one that holds the text, of {columns}")
    end = 0
    for group in range(parquet.metadata.num_row_groups):
        begin, end = end, end + parquet.metadata.row_group(group).num_rows
        if end <= span.start or begin >= span.stop:
            continue
        row = begin
        for batch in parquet.iter_batches(batch_size=1024, row_groups=[group], columns=[field]):
            for text in batch.column(0).to_pylist():
                if span.start <= row < span.stop:
                    if not isinstance(text, str):
                        raise ValueError(
                            f"{span.file.path}: row {row} has no text in field {field!r}; set data.field to the field that holds the text"
                        )
                    if text:
                        yield row, text
                row += 1


def open_parquet(path: str) -> Any:
    """Raises ValueError for a file that is not parquet."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a parquet file ({str(error).splitlines()[0]}); mend or remove it") from None


def line_number(file: File, position: int) -> int:
    """Line, counted from 1, of a byte of a file."""
    with mapped(file.path) as view:
        return view[:position].count(b"\n") + 1
