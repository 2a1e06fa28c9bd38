import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from conf.schema import DataConfig, TokenizerConfig
from data import Tokenizer, cache, corpora, prepare
from data.corpora import TextCorpus
from data.shards import HEADER, Shard, Tokens, write_shard
from data.tokenizer import RankedTokenizer, bytes_tokenizer
from tests.test_corpora import SHAKESPEARE, TEXTS, text_config, write_rows

ROOT = Path(__file__).parents[1]
BYTES = TokenizerConfig()
EOT = 256

# Prepares argv[1:] = path, cache, tokenizer, workers in many small pieces, and prints the fingerprint.
PREPARE = """
import sys
from conf.schema import DataConfig, TokenizerConfig
from data import corpora, prepare

path, cache, name, workers = sys.argv[1:]
corpora.PIECE_BYTES = 40_000
data = DataConfig(source="text", path=path, cache=cache, workers=int(workers), validation_fraction=0.2)
print(prepare(data, TokenizerConfig(name=name, vocab_size=400, train_megabytes=0.2)).fingerprint)
"""


def start(*arguments) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", PREPARE, *map(str, arguments)], cwd=ROOT, **pipes)


def finish(process: subprocess.Popen) -> tuple[str, str]:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out, err


def contents(cache: Path) -> dict[str, bytes]:
    """All files of a cache but locks and the record of what was verified, which holds times."""
    files = [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock" and path.name != "verified.json"]
    return {path.relative_to(cache).as_posix(): path.read_bytes() for path in files}


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    found = [int(child) for child in children.read_text().split()] if children.exists() else []
    return found + [below for child in found for below in descendants(child)]


def alive(pid: int) -> bool:
    """Whether a process still runs; one that ended but was not yet waited for does not."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


@pytest.fixture(scope="module")
def many_rows(tmp_path_factory) -> str:
    generator = np.random.default_rng(0)
    words = [f"w{index}é" for index in range(500)]
    texts = [" ".join(generator.choice(words, 200)) for _ in range(1500)]
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", texts)


@pytest.fixture(scope="module")
def uninterrupted(many_rows, tmp_path_factory) -> tuple[str, dict[str, bytes]]:
    cache = tmp_path_factory.mktemp("cache")
    out, _ = finish(start(many_rows, cache, "bpe", 2))
    return out, contents(cache)


def test_a_killed_preparation_is_taken_up_and_ends_with_the_same_bytes(many_rows, uninterrupted, tmp_path):
    kept: dict[Path, int] = {}
    num_hits = 0
    for num_shards in (1, 8, 20, 35, 50):  # the moment of each SIGKILL: so many shards are there
        process = start(many_rows, tmp_path, "bpe", 2)
        wait_until(lambda: len(list(tmp_path.rglob("*.bin"))) >= num_shards or process.poll() is not None)  # noqa: B023
        workers = descendants(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if not list(tmp_path.rglob("meta.json")):
            num_hits += 1
            assert workers or not Path("/proc/self/task").exists()
        wait_until(lambda: not any(alive(pid) for pid in workers), 10)  # noqa: B023
        process.communicate()
        for path, mtime in kept.items():
            assert path.stat().st_mtime_ns == mtime, "a finished shard was made again"
        names = [path.name for path in tmp_path.rglob("*.bin")]  # a piece makes two shards, and is made again if it has but one
        kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.bin") if names.count(path.name) == 2}
    assert num_hits >= 3
    out, _ = finish(start(many_rows, tmp_path, "bpe", 2))
    assert (out, contents(tmp_path)) == uninterrupted


@pytest.mark.parametrize("workers", [1, 3])
def test_the_bytes_do_not_depend_on_the_number_of_workers(many_rows, uninterrupted, tmp_path, workers):
    out, _ = finish(start(many_rows, tmp_path, "bpe", workers))
    assert (out, contents(tmp_path)) == uninterrupted


def test_two_processes_at_once(many_rows, uninterrupted, tmp_path):
    first = start(many_rows, tmp_path, "bpe", 2)
    wait_until(lambda: list(tmp_path.rglob("*.bin")))
    first.send_signal(signal.SIGSTOP)  # until the second is there
    second = start(many_rows, tmp_path, "bpe", 2)
    assert second.stderr and any("waiting for another process that prepares" in line for line in second.stderr)
    first.send_signal(signal.SIGCONT)
    assert finish(first)[0] == uninterrupted[0]
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.bin")}
    out, err = finish(second)
    assert out == uninterrupted[0] and "waiting" not in err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.bin")} == written
    assert contents(tmp_path) == uninterrupted[1]


def test_a_shard_is_whole_or_not_there(config, tmp_path, monkeypatch):
    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(ValueError, match=r"data\.cache=.*: No space left on device; once that is mended"):
        patched.setattr(os, "fsync", refuse)
        prepare(config, BYTES)
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.tmp"))
    folder = next(tmp_path.rglob("train"))
    (folder / "left_by_a_kill.bin.1.tmp").touch()
    prepare(config, BYTES)
    assert list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch, workers):
    paths = [Path(write_rows(tmp_path / f"{index}.jsonl", TEXTS)) for index in range(2)]
    config = text_config(list(map(str, paths)), cache=str(tmp_path / "cache"), workers=workers)
    monkeypatch.setattr(corpora, "PIECE_BYTES", 1000)
    pieces = TextCorpus.pieces

    def pieces_of_a_lost_file(self, folder=None):
        found = pieces(self)
        paths[1].unlink()
        return found

    with monkeypatch.context() as patched, pytest.raises(ValueError, match=rf"{paths[1]}: No such file or directory; once that is mended"):
        patched.setattr(TextCorpus, "pieces", pieces_of_a_lost_file)
        prepare(config, BYTES)
    assert list(tmp_path.rglob("*.bin"))


def test_ctrl_c_is_quiet_and_quick(many_rows, tmp_path):
    script = "from data import corpora, prepare as _; import data.prepare as tool, sys; corpora.PIECE_BYTES = 40_000; tool.main(sys.argv[1:])"
    overrides = ["data=text", f"data.path={many_rows}", f"data.cache={tmp_path}", "data.workers=2"]
    process = subprocess.Popen([sys.executable, "-c", script, *overrides], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: list(tmp_path.rglob("*.bin")))
    workers = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (130, "", "\ninterrupted: what is prepared is kept, and the same command goes on from there\n")
    wait_until(lambda: not any(alive(pid) for pid in workers), 5)


def test_a_mistake_in_a_worker_comes_back_as_one_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "word " * 500}) + "\n" for _ in range(200)) + "{broken\n")
    process = start(path, tmp_path / "cache", "bytes", 2)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"ValueError: {path}: line 201 is not JSON" in err.splitlines()[-1]


def test_a_mistake_found_while_a_tokenizer_is_trained_comes_back_too(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "word " * 500}) + "\n{broken\n")
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        prepare(text_config(str(path), cache=str(tmp_path / "cache")), TokenizerConfig(name="bpe"))


@pytest.fixture
def config(tmp_path) -> DataConfig:
    return text_config(write_rows(tmp_path / "rows.jsonl", TEXTS), cache=str(tmp_path / "cache"), validation_fraction=0.3)


def test_what_is_prepared_is_the_text(config):
    corpus = prepare(config, BYTES)
    train, validation = corpus.train["text"], corpus.validation["validation"]
    streams = [bytes_tokenizer().decode(part.read(0, len(part))) for part in (train, validation)]
    assert sorted(streams[0].split("<|endoftext|>")[:-1] + streams[1].split("<|endoftext|>")[:-1]) == sorted(TEXTS)
    assert train.num_documents + validation.num_documents == len(TEXTS)
    assert train.num_bytes + validation.num_bytes == sum(len(text.encode()) for text in TEXTS)
    assert len(train) == train.num_bytes + train.num_documents
    starts = train.shards[0].documents
    assert starts[0] == 0 and (train.shards[0].tokens[starts[1:].astype(int) - 1] == EOT).all()
    entry = corpus.meta["parts"]["train/text"]
    assert entry == {"shards": 1, "tokens": len(train), "documents": train.num_documents, "bytes": train.num_bytes}
    assert corpus.weights is None and corpus.meta["tokenizer"]["hash"] == corpus.tokenizer.hash == Tokenizer.load(corpus.folder).hash


def test_preparing_again_reads_the_cache(config, monkeypatch):
    first = prepare(config, BYTES)
    monkeypatch.setattr(cache, "fill", None)
    monkeypatch.setattr(Shard, "verify", None)
    again = prepare(config, BYTES)
    assert (again.fingerprint, again.folder) == (first.fingerprint, first.folder)
    assert prepare(config, bytes_tokenizer()).folder == first.folder


def test_the_fingerprint_is_of_the_tokens(config, tmp_path):
    first = prepare(config, BYTES)
    config.cache = str(tmp_path / "elsewhere")
    assert prepare(config, BYTES).fingerprint == first.fingerprint
    config.validation_fraction = 0.4
    assert prepare(config, BYTES).fingerprint != first.fingerprint


def test_the_standard_library_is_a_corpus(tmp_path):
    corpus = prepare(DataConfig(cache=str(tmp_path)), BYTES)
    assert len(corpus.train["stdlib"]) + len(corpus.validation["validation"]) > 5e6


def test_nanogpts_numbers(tmp_path):
    if not SHAKESPEARE.exists():
        pytest.skip("no tinyshakespeare here")
    corpus = prepare(text_config(str(SHAKESPEARE), cache=str(tmp_path), validation_split="tail", validation_fraction=0.1), BYTES)
    assert corpus.train["text"].num_bytes == 1003854 and corpus.validation["validation"].num_bytes == 111540


@pytest.mark.parametrize("split", ["documents", "tail"])
def test_an_empty_part_is_refused(tmp_path, split):
    path = write_rows(tmp_path / "one.jsonl", ["the only text"])
    with pytest.raises(ValueError, match=r"validation/validation empty; set data\.validation_split=tail"):
        prepare(text_config(path, cache=str(tmp_path / "cache"), validation_split=split, validation_fraction=0.001), BYTES)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="validation/v has no text"):
        prepare(text_config(path, cache=str(tmp_path / "cache"), validation={"v": str(tmp_path / "empty.txt")}), BYTES)


def test_a_cache_that_cannot_be_made(config, tmp_path):
    (tmp_path / "file").touch()
    config.cache = str(tmp_path / "file" / "cache")
    with pytest.raises(ValueError, match=r"data\.cache=.* cannot be made"):
        prepare(config, BYTES)


def change(path: Path, position: int, content: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[position : position + len(content)] = content
    path.write_bytes(data)


DAMAGES = {
    "cut off": lambda path: os.truncate(path, path.stat().st_size - 1),
    "is not a token shard": lambda path: os.truncate(path, 100),
    "has .* bytes, not what its header says": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "is not a token": lambda path: change(path, 0, b"GPTFLAT"),
    "has version 9 where this program reads 1": lambda path: change(path, 8, b"\x09"),
    "what its header says": lambda path: change(path, 16, b"\x00\x00"),
    "holds token 60000, beyond the vocabulary of 257": lambda path: change(path, 40, (60000).to_bytes(8, "little")),
    "was written with another tokenizer": lambda path: change(path, 48, b"\x00" * 32),
    "does not have its checksum": lambda path: change(path, HEADER.size + 10, b"\xff"),
    "not have its checksum": lambda path: change(path, path.stat().st_size - 8, b"\xff"),
    "have its checksum": lambda path: change(path, 32, b"\xff"),  # bytes of text
    "its checksum: it is corrupt": lambda path: change(path, 85, b"\x00\x00\x00"),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damage_is_found_named_and_mended_by_deletion(config, message):
    corpus = prepare(config, BYTES)
    before = contents(corpus.folder)
    path = corpus.folder / "train/text/00000.bin"
    DAMAGES[message](path)
    with pytest.raises(ValueError, match=rf"{path} .*{message}.*; delete it, it is rebuilt at the next start") as caught:
        prepare(config, BYTES)
    assert "\n" not in str(caught.value)
    path.unlink()
    assert prepare(config, BYTES).fingerprint == corpus.fingerprint
    assert contents(corpus.folder) == before


def test_a_token_beyond_the_vocabulary_is_found_although_the_checksum_is_right(config):
    corpus = prepare(config, BYTES)
    path = corpus.folder / "train/text/00000.bin"
    write_shard(path, np.array([1, 257, 2]), [0], 2, corpus.tokenizer)
    with pytest.raises(ValueError, match=r"00000.bin holds token 257, beyond the vocabulary of 257"):
        prepare(config, BYTES)


def test_damaged_meta_is_named(config):
    folder = prepare(config, BYTES).folder
    (folder / "meta.json").write_text("{")
    with pytest.raises(ValueError, match=r"meta.json cannot be read; delete it"):
        prepare(config, BYTES)
    (folder / "meta.json").unlink()
    assert prepare(config, BYTES).folder == folder


def numbered(vocab_size: int) -> Tokenizer:
    """A tokenizer of that vocabulary, for tokens that are just numbers."""
    return RankedTokenizer("numbered", ".", tuple(index.to_bytes(3, "big") for index in range(vocab_size - 1)))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, "<u2"), (2**16 + 1, "<u4")])
def test_a_shard_is_little_endian_integers_as_wide_as_the_vocabulary_needs(tmp_path, vocab_size, dtype):
    ids = np.array([0, 1, vocab_size - 1, 5])
    write_shard(tmp_path / "a.bin", ids, [0, 3], 7, numbered(vocab_size))
    shard = Shard.open(tmp_path / "a.bin", numbered(vocab_size))
    shard.verify()
    assert shard.tokens.dtype == np.dtype(dtype) and shard.tokens.tolist() == ids.tolist()
    assert shard.documents.tolist() == [0, 3] and shard.header.max_token == vocab_size - 1 and shard.header.num_bytes == 7
    raw = (tmp_path / "a.bin").read_bytes()
    assert raw[128:] == ids.astype(dtype).tobytes() + np.array([0, 3], "<u8").tobytes()


def make_tokens(folder: Path, stream: np.ndarray, sizes: list[int], vocab_size: int = 60000) -> Tokens:
    """A stream of tokens in shards of the sizes, and a last one with the rest."""
    folder.mkdir(exist_ok=True)
    tokenizer = numbered(vocab_size)
    for index, part in enumerate(np.split(stream, np.cumsum(sizes))):
        write_shard(folder / f"{index}.bin", part, [], 3 * len(part), tokenizer)
    return Tokens([Shard.open(folder / f"{index}.bin", tokenizer) for index in range(len(sizes) + 1)])


def test_shards_read_as_one_stream(tmp_path):
    stream = np.random.default_rng(0).integers(0, 60000, 100)
    tokens = make_tokens(tmp_path, stream, [10, 0, 1, 40, 0])
    assert len(tokens) == 100
    for first in range(0, 101):
        for last in range(first, 110):
            assert tokens.read(first, last).tolist() == stream[first:last].tolist()
    assert tokens.read(0, 5).dtype == np.int64
    assert len(make_tokens(tmp_path / "empty", stream[:0], [])) == 0
