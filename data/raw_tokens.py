"""Files of raw uint16, as nanoGPT and llm.c write them.

Such a file says nothing of itself, so it is read through once, to count its documents and to see
that all ids are in the vocabulary; a file in <cache>/tokens-<key>/ remembers."""

import hashlib
import sys
import time
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from data.cache_folders import record_of_file, write_if_possible
from data.files import open_regular, read_json
from data.shards import MAGIC, VERSION, Header, Shard, is_old
from data.tokenizer import Tokenizer

# Tokens that are looked at together.
BLOCK = 2**22
REMEDY = "name the tokenizer that it was made with, or get the file again"
OTHERS = {
    b"\x93NUMPY": "a .npy file",
    b"PK\x03\x04": "a zip file, as torch.save writes",
    b"\x1f\x8b": "gzipped",
    b"PAR1": "a parquet file",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"\xfd7zXZ\0": "compressed by xz",
}
# How llm.c's files of uint16 begin: 256 int32, of which the third is the number of tokens.
LLMC = (20240520, 1)
LLMC_HEADER_BYTES = 1024


class Counts(TypedDict):
    """The counts that a raw file does not state of itself: fields of a Header."""

    num_tokens: int
    num_documents: int
    num_bytes: int
    max_token: int


class Scan(TypedDict):
    """The findings in a raw file, and when it was last read through."""

    offset: int
    header: Counts
    sha256: str
    looked: float


def is_own_shard(path: Path) -> bool:
    """Returns whether a file begins as a shard of ours."""
    with open_regular(path) as file:
        return file.read(len(MAGIC)) == MAGIC


def open_raw(path: Path, tokenizer: Tokenizer, folder: Path, days: float) -> Shard:
    """Returns the shard that a raw file is, read through at least once in so many days.

    Args:
        path: the file
        tokenizer: the tokenizer of its ids
        folder: the folder of the cache that remembers what was found
        days: days after which the file is read through again

    Raises:
        ValueError: the file is of another kind, or holds other tokens than it did
    """
    found = look_through(path, tokenizer, folder, days)
    header = Header(MAGIC, VERSION, 2, tokenizer=bytes.fromhex(tokenizer.hash), **found["header"])
    return Shard(path, header, bytes.fromhex(found["sha256"]), found["offset"], REMEDY)


def look_through(path: Path, tokenizer: Tokenizer, folder: Path, days: float) -> Scan:
    """Returns what is in a raw file. Raises ValueError where it holds other tokens than it did,
    with the size and time that it had."""
    record = record_of_file(folder, path)
    try:
        found = read_json(record, Scan)
    except (FileNotFoundError, ValueError):
        found = scan(path, tokenizer)
        write_if_possible(record, found)
        return found
    # Disks lose bits, which changes neither the size nor the time of a file.
    if is_old([found["looked"]], days):
        again = scan(path, tokenizer)
        if again["sha256"] != found["sha256"]:
            raise ValueError(
                f"{path} holds other tokens than before, though its size and time are the same: it"
                f" is corrupt; get it again, or delete {record} if they are right"
            )
        write_if_possible(record, again)
    return found


def scan(path: Path, tokenizer: Tokenizer) -> Scan:
    """Reads through a file of raw uint16. Returns its tokens, documents, bytes of text and largest
    id, and the sha256 of the tokens."""
    offset = check_raw(path, tokenizer)
    # Mapped, a file may be larger than the memory.
    ids = np.memmap(path, "<u2", "r", offset)
    digest = hashlib.sha256()
    # One pass serves the counts, the check of every id, and the digest.
    counts = count_ids(ids, tokenizer, path, digest)
    print(
        f"note: {path} holds {len(ids):,} tokens and begins {tokenizer.decode(ids[:16])!r}",
        file=sys.stderr,
    )
    num_documents, num_bytes = documents_and_bytes(counts, tokenizer)
    header: Counts = {
        "num_tokens": len(ids),
        "num_documents": num_documents,
        "num_bytes": num_bytes,
        "max_token": int(np.flatnonzero(counts)[-1]),
    }
    return {"offset": offset, "header": header, "sha256": digest.hexdigest(), "looked": time.time()}


def check_raw(path: Path, tokenizer: Tokenizer) -> int:
    """Returns the byte of a file of raw uint16 where its tokens begin. Raises ValueError for a file
    that its beginning shows to be another."""
    if tokenizer.vocab_size > 2**16:
        raise ValueError(
            f"{path} is no shard of ours, and raw uint16 is too narrow for a vocabulary of"
            f" {tokenizer.vocab_size}; {REMEDY}"
        )
    # nanoGPT's characters are numbered by the text, and meta.pkl has the numbers.
    if (path.parent / "meta.pkl").exists():
        raise ValueError(
            f"{path} has a meta.pkl beside it: its ids are nanoGPT's characters, which no tokenizer"
            " here has; prepare its text with data=text"
        )
    # The first numbers tell what the file is; one of fewer than 12 bytes has fewer of them.
    size = path.stat().st_size
    start = np.fromfile(path, "<i4", 3)
    for magic, kind in OTHERS.items():
        if start.tobytes().startswith(magic):
            raise ValueError(
                f"{path} is {kind}, not a file of uint16; write its ids with numpy:"
                " ids.astype('uint16').tofile(FILE)"
            )
    is_llmc = len(start) == 3 and tuple(start[:2]) == LLMC
    offset = LLMC_HEADER_BYTES if is_llmc else 0
    if size % 2 or size == offset or (is_llmc and size != offset + 2 * start[2]):
        raise ValueError(
            f"{path} has {size} bytes, which no file of uint16 has: it is cut off or of another"
            " kind; get it again"
        )
    ids = np.memmap(path, "<u2", "r", offset)[:BLOCK]
    refuse_other_widths(path, ids)
    check_largest(path, int(ids.max()), tokenizer)
    return offset


def refuse_other_widths(path: Path, ids: np.ndarray) -> None:
    """Raises ValueError where the first numbers of a file, read as uint16, show zeros as other
    numbers have them; a few alone show nothing."""
    if len(ids) < 16:
        return
    # Wider numbers, lowest byte first, are small ids with zeros between them.
    if ids[::2].any() and not ids[1::2].any():
        width = 32 if ids[2::4].any() else 64
        raise ValueError(
            f"{path} holds uint{width}, not uint16: every second id would be 0; write it again with"
            f" numpy: numpy.fromfile(FILE, 'uint{width}').astype('uint16').tofile(OTHER)"
        )
    if ids[1::2].any() and not ids[::2].any():
        raise ValueError(
            f"{path} holds wider numbers than uint16, highest byte first: every second id would be"
            " 0; write it again with numpy:"
            " numpy.fromfile(FILE, '>u4').astype('<u2').tofile(OTHER)"
        )
    # A copy that was broken off may have room for its text, and nothing in it.
    if not ids.any():
        raise ValueError(f"{path} holds nothing but zeros; get it again")


def check_largest(path: Path, largest: int, tokenizer: Tokenizer) -> None:
    """Raises ValueError for a largest id of a file that is beyond the vocabulary."""
    if largest >= tokenizer.vocab_size:
        raise ValueError(
            f"{path} holds token {largest}, beyond the vocabulary of {tokenizer.vocab_size} of"
            f" tokenizer={tokenizer.name}; {REMEDY}"
        )


def count_ids(ids: np.ndarray, tokenizer: Tokenizer, path: Path, digest: Any = None) -> np.ndarray:
    """Counts the ids of a file.

    Args:
        ids: the ids
        tokenizer: the tokenizer, whose vocabulary holds them
        path: the file, for the bar and the error
        digest: a hash that is updated with the ids on the way

    Returns:
        How often each id of the vocabulary is there, int64 (vocab_size,).

    Raises:
        ValueError: an id is beyond the vocabulary
    """
    from tqdm import tqdm

    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    # tqdm's None shows a bar on a terminal only. A short file needs none.
    disable = None if len(ids) > 100 * BLOCK else True
    for first in tqdm(
        range(0, len(ids), BLOCK),
        desc=f"reading {path.name}",
        unit_scale=2 * BLOCK,
        unit="B",
        disable=disable,
        file=sys.stderr,
    ):
        block = ids[first : first + BLOCK]
        check_largest(path, int(block.max()), tokenizer)
        counts += np.bincount(block, minlength=tokenizer.vocab_size)
        if digest:
            digest.update(block.data)
    return counts


def documents_and_bytes(counts: np.ndarray, tokenizer: Tokenizer) -> tuple[int, int]:
    """Returns the documents and the bytes of text that counted ids stand for."""
    return int(counts[tokenizer.eot]), int(counts @ tokenizer.byte_lengths())
