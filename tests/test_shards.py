import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import SoftFileLease

from conf.text import DataConfig, TokenizerConfig
from data import Tokenizer, cache_folders, choose_tokenizer, pieces, prepare, prepared, shards
from data.checks import check_data
from data.corpora import TextCorpus
from data.overlap import print_note
from data.shards import HEADER, Shard, Tokens, key, write_shard
from data.tokenizer import RankedTokenizer, bytes_tokenizer
from tests.test_corpora import SHAKESPEARE, TEXTS, text_config, write_rows

ROOT = Path(__file__).parents[1]
BYTES = TokenizerConfig()
EOT = 256

# Prepares argv[1:] = path, cache, tokenizer, workers in many small pieces, and prints the
# fingerprint.
PREPARE = """
import sys
from conf.text import DataConfig, TokenizerConfig
from data import pieces, prepare

path, cache, name, workers = sys.argv[1:]
pieces.PIECE_BYTES = 40_000
data = DataConfig(
    source="text", path=path, cache=cache, workers=int(workers), validation_fraction=0.2
)
print(prepare(data, TokenizerConfig(name=name, vocab_size=400, train_megabytes=0.2)).fingerprint)
"""


def start(*arguments) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE, *map(str, arguments)], cwd=ROOT, **pipes
    )


def finish(process: subprocess.Popen) -> tuple[str, str]:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out, err


def contents(cache: Path) -> dict[str, bytes]:
    """All files of a cache but locks, and records that hold times or paths."""
    paths = [
        path
        for path in cache.rglob("*")
        if path.is_file() and path.suffix != ".lock" and path.name != "verified.json"
    ]
    files = [path for path in paths if not path.name.startswith(("digests-", "asked-"))]
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


def test_a_killed_preparation_is_taken_up_and_ends_with_the_same_bytes(
    many_rows, uninterrupted, tmp_path
):
    kept: dict[Path, int] = {}
    num_hits = 0
    for num_shards in (1, 8, 20, 35, 50):  # the moment of each SIGKILL: so many shards are there
        process = start(many_rows, tmp_path, "bpe", 2)
        wait_until(
            lambda n=num_shards, p=process: (
                len(list(tmp_path.rglob("*.bin"))) >= n or p.poll() is not None
            )
        )
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
        # a piece makes two shards, and is made again if it has but one
        names = [path.name for path in tmp_path.rglob("*.bin")]
        kept = {
            path: path.stat().st_mtime_ns
            for path in tmp_path.rglob("*.bin")
            if names.count(path.name) == 2
        }
    assert num_hits >= 3
    out, _ = finish(start(many_rows, tmp_path, "bpe", 2))
    assert (out, contents(tmp_path)) == uninterrupted


@pytest.mark.parametrize("workers", [1, 3])
def test_the_bytes_do_not_depend_on_the_number_of_workers(
    many_rows, uninterrupted, tmp_path, workers
):
    out, _ = finish(start(many_rows, tmp_path, "bpe", workers))
    assert (out, contents(tmp_path)) == uninterrupted


def test_two_processes_at_once(many_rows, uninterrupted, tmp_path):
    first = start(many_rows, tmp_path, "bpe", 2)
    wait_until(lambda: list(tmp_path.rglob("*.bin")))
    first.send_signal(signal.SIGSTOP)  # until the second is there
    second = start(many_rows, tmp_path, "bpe", 2)
    assert second.stderr and any(
        "waiting for another process that prepares" in line for line in second.stderr
    )
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

    with (
        monkeypatch.context() as patched,
        pytest.raises(
            ValueError, match=r"data\.cache=.*: No space left on device; once that is mended"
        ),
    ):
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
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1000)
    pieces_of = TextCorpus.pieces

    def pieces_of_a_lost_file(self, folder=None):
        found = pieces_of(self)
        paths[1].unlink()
        return found

    with (
        monkeypatch.context() as patched,
        pytest.raises(
            ValueError, match=rf"{paths[1]}: No such file or directory; once that is mended"
        ),
    ):
        patched.setattr(TextCorpus, "pieces", pieces_of_a_lost_file)
        prepare(config, BYTES)
    assert list(tmp_path.rglob("*.bin"))


def test_ctrl_c_is_quiet_and_quick(many_rows, tmp_path):
    script = (
        "from data import pieces, prepare as _; import data.prepare as tool, sys;"
        " pieces.PIECE_BYTES = 40_000; tool.main(sys.argv[1:])"
    )
    overrides = ["data=text", f"data.path={many_rows}", f"data.cache={tmp_path}", "data.workers=2"]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *overrides],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: list(tmp_path.rglob("*.bin")))
    workers = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (
        130,
        "",
        "\ninterrupted: what is prepared is kept, and the same command goes on from there\n",
    )
    wait_until(lambda: not any(alive(pid) for pid in workers), 5)


def test_a_mistake_in_a_worker_comes_back_as_one_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"text": "word " * 500}) + "\n" for _ in range(200)) + "{broken\n"
    )
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
    return text_config(
        write_rows(tmp_path / "rows.jsonl", TEXTS),
        cache=str(tmp_path / "cache"),
        validation_fraction=0.3,
    )


def test_what_is_prepared_is_the_text(config):
    corpus = prepare(config, BYTES)
    train, validation = corpus.train["text"], corpus.validation["validation"]
    streams = [bytes_tokenizer().decode(part.read(0, len(part))) for part in (train, validation)]
    assert sorted(
        streams[0].split("<|endoftext|>")[:-1] + streams[1].split("<|endoftext|>")[:-1]
    ) == sorted(TEXTS)
    assert train.num_documents + validation.num_documents == len(TEXTS)
    assert train.num_bytes + validation.num_bytes == sum(len(text.encode()) for text in TEXTS)
    assert len(train) == train.num_bytes + train.num_documents
    starts = train.shards[0].documents
    assert starts[0] == 0 and (train.shards[0].tokens[starts[1:].astype(int) - 1] == EOT).all()
    entry = corpus.meta["parts"]["train/text"]
    assert entry == {
        "shards": 1,
        "tokens": len(train),
        "documents": train.num_documents,
        "bytes": train.num_bytes,
    }
    assert (
        corpus.weights is None
        and corpus.meta["tokenizer"]["hash"]
        == corpus.tokenizer.hash
        == Tokenizer.load(corpus.folder).hash
    )


def test_preparing_again_reads_the_cache(config, monkeypatch):
    first = prepare(config, BYTES)
    monkeypatch.setattr(prepared, "fill", None)
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
    corpus = prepare(
        text_config(
            str(SHAKESPEARE), cache=str(tmp_path), validation_split="tail", validation_fraction=0.1
        ),
        BYTES,
    )
    assert (
        corpus.train["text"].num_bytes == 1003854
        and corpus.validation["validation"].num_bytes == 111540
    )


@pytest.mark.parametrize("split", ["documents", "tail"])
def test_an_empty_part_is_refused(tmp_path, split):
    path = write_rows(tmp_path / "one.jsonl", ["the only text"])
    with pytest.raises(
        ValueError,
        match=(
            r"validation/validation empty, by its tail too; raise data\.validation_fraction, give"
            r" more text, or name"
        ),
    ):
        prepare(
            text_config(
                path,
                cache=str(tmp_path / "cache"),
                validation_split=split,
                validation_fraction=0.001,
            ),
            BYTES,
        )
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="validation/v has no text"):
        prepare(
            text_config(
                path, cache=str(tmp_path / "cache"), validation={"v": str(tmp_path / "empty.txt")}
            ),
            BYTES,
        )


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
def test_a_few_documents_give_their_tail(tmp_path, capsys, kind):
    path = tmp_path / f"few.{kind}"
    if kind == "txt":
        path.write_text("one\n<eos>\ntwo\n<eos>\nthree\n")
    else:
        write_rows(path, ["one", "two", "three"])
    config = text_config(
        str(path), cache=str(tmp_path / "cache"), separator="<eos>", validation_fraction=0.01
    )
    print_note.cache_clear()
    corpus = prepare(config, TokenizerConfig(name="bpe", vocab_size=257))
    said = (
        "note: data.validation_fraction=0.01 of 3 documents leaves validation/validation empty, so"
        " the tail of the text is held out"
    )
    assert capsys.readouterr().err.count(said) == 1
    config.validation_split = "tail"
    assert prepare(config, TokenizerConfig(name="bpe", vocab_size=257)).folder == corpus.folder
    assert len(corpus.validation["validation"]) > 1 and said not in capsys.readouterr().err


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
    "has .* bytes, not what its header says": lambda path: path.write_bytes(
        path.read_bytes() + b"x"
    ),
    "is not a token": lambda path: change(path, 0, b"GPTFLAT"),
    "has version 9 where this program reads 1": lambda path: change(path, 8, b"\x09"),
    "what its header says": lambda path: change(path, 16, b"\x00\x00"),
    "holds token 60000, beyond the vocabulary of 257": lambda path: change(
        path, 40, (60000).to_bytes(8, "little")
    ),
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
    with pytest.raises(
        ValueError, match=rf"{path} .*{message}.*; delete it, it is rebuilt at the next start"
    ) as caught:
        prepare(config, BYTES)
    assert "\n" not in str(caught.value)
    path.unlink()
    assert prepare(config, BYTES).fingerprint == corpus.fingerprint
    assert contents(corpus.folder) == before


def test_a_token_beyond_the_vocabulary_is_found_although_the_checksum_is_right(config):
    corpus = prepare(config, BYTES)
    path = corpus.folder / "train/text/00000.bin"
    write_shard(path, np.array([1, 257, 2]), [0], 2, corpus.tokenizer)
    with pytest.raises(
        ValueError, match=r"00000.bin holds token 257, beyond the vocabulary of 257"
    ):
        prepare(config, BYTES)


def test_a_token_beyond_its_shards_own_maximum_is_found(tmp_path):
    """The maximum is what is compared with the vocabulary, and a writer may have got it wrong."""
    path, tokenizer = tmp_path / "a.bin", numbered(300)
    write_shard(path, np.array([1, 200, 2]), [0], 2, tokenizer)
    header = Shard.open(path, tokenizer).header._replace(max_token=2)
    content = path.read_bytes()[HEADER.size :]
    checksum = header.digest()
    checksum.update(content)
    path.write_bytes(HEADER.pack(*header, checksum.digest()) + content)
    with pytest.raises(ValueError, match=r"a.bin holds token 200, beyond its own maximum of 2; "):
        Shard.open(path, tokenizer).verify()


def test_damaged_meta_is_named(config):
    folder = prepare(config, BYTES).folder
    content = json.loads((folder / "meta.json").read_text())
    damages = [
        {"parts": {"train/../..": content["parts"]["train/text"]}},
        {"parts": {"train/text": {"shards": 10**12}}},
        {"fingerprint": 3},
    ]
    for damage in [
        "{",
        "[]",
        "",
        "[" * 200_000,
        *(json.dumps(content | damage) for damage in damages),
    ]:
        (folder / "meta.json").write_text(damage)
        with pytest.raises(ValueError, match=r"meta.json cannot be read; delete it") as caught:
            prepare(config, BYTES)
        assert "\n" not in str(caught.value)
    (folder / "meta.json").unlink()
    os.mkfifo(folder / "meta.json")
    with pytest.raises(ValueError, match=r"meta.json is no regular file"):
        prepare(config, BYTES)
    (folder / "meta.json").unlink()
    assert prepare(config, BYTES).folder == folder


def test_a_shard_that_is_a_pipe_is_not_waited_for(config):
    path = prepare(config, BYTES).folder / "train/text/00000.bin"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"00000.bin is no regular file"):
        prepare(config, BYTES)


def rot(path: Path, position: int) -> None:
    """Flips a bit of a file, whose size and time stay."""
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("part", ["train/text", "validation/validation"])
def test_bits_that_are_lost_are_noticed_in_time(config, part):
    corpus = prepare(config, BYTES)
    record, path = corpus.folder / "verified.json", corpus.folder / part / "00000.bin"
    rot(path, HEADER.size + 10)
    prepare(config, BYTES)  # a moment after the last look
    known = json.loads(record.read_text())
    for looked in (
        time.time() - 8 * 86400,
        time.time() + 8 * 86400,
        None,
    ):  # also by a clock that is ahead, and before there were times
        record.write_text(
            json.dumps(
                {name: [*entry[:2], *([looked] if looked else [])] for name, entry in known.items()}
            )
        )
        with pytest.raises(
            ValueError, match=rf"{path} does not have its checksum: it is corrupt; delete it"
        ):
            prepare(config, BYTES)
    record.write_text(json.dumps(known))
    config.verify_days = 30
    prepare(config, BYTES)
    config.verify_days = 0
    with pytest.raises(ValueError, match=rf"{path} does not have its checksum"):
        prepare(config, BYTES)
    path.unlink()
    assert prepare(config, BYTES).fingerprint == corpus.fingerprint


def test_text_that_was_moved_is_the_same_corpus(config, tmp_path, monkeypatch):
    first = prepare(config, TokenizerConfig(name="bpe", vocab_size=280))
    (tmp_path / "there").mkdir()
    config.path = str(tmp_path / "there" / "rows.jsonl")
    Path(config.path).write_bytes((tmp_path / "rows.jsonl").read_bytes())  # of another time
    monkeypatch.setattr(prepared, "fill", None)
    monkeypatch.setattr(choose_tokenizer, "train_apart", None)
    again = prepare(config, TokenizerConfig(name="bpe", vocab_size=280))
    assert (again.folder, again.fingerprint) == (first.folder, first.fingerprint)


def test_a_shard_that_is_damaged_after_its_text_is_gone_has_another_remedy(config, tmp_path):
    corpus, text = prepare(config, BYTES), (tmp_path / "rows.jsonl").read_bytes()
    path = corpus.folder / "train/text/00000.bin"
    rot(path, HEADER.size + 10)
    (tmp_path / "rows.jsonl").unlink()
    config.verify_days = 0
    with pytest.raises(
        ValueError, match=rf"{path} does not have its checksum.*; bring its text back and delete"
    ):
        prepare(config, BYTES)
    (tmp_path / "rows.jsonl").write_bytes(text)
    path.unlink()
    assert prepare(config, BYTES).fingerprint == corpus.fingerprint


def test_text_that_is_gone_is_not_needed(config, tmp_path, capsys):
    bpe = TokenizerConfig(name="bpe", vocab_size=280)
    first = prepare(config, bpe)
    (tmp_path / "rows.jsonl").unlink()
    for tokenizer in (bpe, first.tokenizer):
        again = prepare(config, tokenizer)
        assert (again.folder, again.fingerprint, [*again.train]) == (
            first.folder,
            first.fingerprint,
            ["text"],
        )
    check_data(config, bpe, 32)
    assert (
        f"data.path={config.path} matches no file; what was prepared from it is used:"
        f" {first.folder}" in capsys.readouterr().err
    )
    for change in ({"vocab_size": 279}, {"train_megabytes": 1.0}):
        with pytest.raises(ValueError, match="matches no file"):
            prepare(config, TokenizerConfig(**{"name": "bpe", "vocab_size": 280, **change}))
    config.validation_fraction = 0.2
    with pytest.raises(ValueError, match="matches no file"):
        prepare(config, bpe)


@pytest.mark.parametrize("damage", [b"", b'"cut', b"[1]", b"\xff" * 9])
def test_a_damaged_note_of_what_was_asked_for_is_made_again(config, tmp_path, damage):
    first = prepare(config, BYTES)
    for record in (tmp_path / "cache").glob("asked-*.json"):
        record.write_bytes(damage)
    prepare(config, BYTES)
    (tmp_path / "rows.jsonl").unlink()
    assert prepare(config, BYTES).folder == first.folder


def test_what_stands_in_the_way_in_the_cache_is_named(config, tmp_path):
    corpus = prepare(config, BYTES)
    lock = tmp_path / "cache" / f"{corpus.folder.name}.lock"
    before = contents(corpus.folder)

    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=match) as caught:
            prepare(config, BYTES)
        assert "\n" not in str(caught.value)

    (corpus.folder / "meta.json").unlink()
    lock.unlink()
    os.mkfifo(lock)
    refused(rf"{lock}: .*; once that is mended")
    lock.unlink()
    record = corpus.folder / "train/text/00000.skipped.json"
    record.write_text("{")
    refused(rf"{record} is damaged .*; delete it and the shard of its number")
    record.unlink()
    (corpus.folder / "empty_split.json").write_text("[")
    assert prepare(config, BYTES).fingerprint == corpus.fingerprint
    (corpus.folder / "empty_split.json").unlink()
    assert contents(corpus.folder).keys() == before.keys()
    shutil.rmtree(corpus.folder)
    corpus.folder.touch()
    refused(rf"{corpus.folder} is no folder; delete it")
    corpus.folder.unlink()
    assert prepare(config, BYTES).fingerprint == corpus.fingerprint
    config.cache = str(tmp_path / "gone")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    refused("data.cache=.*gone cannot be made .it is no folder.; name a folder")


def test_what_was_prepared_under_the_times_of_files_is_found(config, monkeypatch):
    """As caches have it that were made before files were known by their content."""
    first = prepare(config, BYTES)
    text = TextCorpus(config)
    old = first.folder.rename(
        first.folder.parent / f"{key(text.identity)}-{first.tokenizer.hash[:16]}"
    )
    monkeypatch.setattr(prepared, "fill", None)
    assert (prepare(config, BYTES).folder, prepare(config, BYTES).fingerprint) == (
        old,
        first.fingerprint,
    )


def test_rows_that_are_skipped_are_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, TEXTS)
    path.write_text(path.read_text() + '{"text": null}\n{"text": \n' + path.read_text())

    def prepared(*overrides: str) -> subprocess.CompletedProcess:
        command = [
            sys.executable,
            "-m",
            "data.prepare",
            "data=text",
            f"data.path={path}",
            f"data.cache={tmp_path / 'cache'}",
            *overrides,
        ]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

    refused = prepared()
    assert refused.returncode == 2
    assert (
        f"error: {path}: line 61 has no text in field 'text': it is null; mend or remove it, or set"
        " data.bad_rows=skip" in refused.stderr
    )
    done = prepared("data.bad_rows=skip")
    assert (
        f"note: train/text: 2 rows that could not be read were skipped, the first: {path}: line 61"
        " has no text" in done.stderr
    )
    assert sum(
        int(number.replace(",", "")) for number in re.findall(r"([\d,]+) documents", done.stdout)
    ) == 2 * len(TEXTS)
    refused = prepared()
    assert re.search(
        "error: .* was prepared without 2 rows that cannot be read, the first: .*; set"
        " data.bad_rows=skip",
        refused.stderr,
    )
    path.write_text('{"text": null}\n')
    with pytest.raises(
        ValueError, match=r"train/text has no text \(rows were skipped, the first: "
    ):
        prepare(
            text_config(str(path), cache=str(tmp_path), bad_rows="skip", validation_split="tail"),
            BYTES,
        )


@pytest.mark.parametrize("bad_rows", ["error", "skip"])
def test_text_that_a_tokenizer_gives_up_on_is_named_or_skipped(tmp_path, bad_rows):
    """A pattern of which nobody knows where it may be cut."""
    path = write_rows(tmp_path / "rows.jsonl", [*TEXTS, "s" + " " * 1_000_010 + "e"])
    tokenizer = RankedTokenizer("own", r"\s+(?!\S)|\s|\S+", bytes_tokenizer().ranks)
    config = text_config(
        path, cache=str(tmp_path / "cache"), bad_rows=bad_rows, validation_split="tail", workers=1
    )
    if bad_rows == "error":
        with pytest.raises(
            ValueError,
            match=(
                r"rows.jsonl: line 61 cannot be made into tokens \(Regex error.*\); mend or remove"
                r" it, or set data.bad"
            ),
        ):
            prepare(config, tokenizer)
    else:
        config.validation = {"v": path}
        assert prepare(config, tokenizer).meta["skipped"] == {"train/text": 1, "validation/v": 1}


def test_a_million_spaces_are_prepared_for_a_trained_tokenizer(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [*TEXTS, "s" + " " * 1_000_010 + "e"])
    corpus = prepare(
        text_config(path, cache=str(tmp_path / "cache"), validation={"v": path}),
        TokenizerConfig(name="bpe", vocab_size=280),
    )
    assert corpus.train["text"].num_bytes == sum(len(text.encode()) for text in TEXTS) + 1_000_012


@pytest.mark.parametrize(
    "number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO]
)
def test_a_file_system_without_locks_is_prepared_in(config, tmp_path, monkeypatch, capsys, number):
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(cache_folders.fcntl, "lockf", refuse)
    corpus = prepare(config, TokenizerConfig(name="bpe", vocab_size=280))
    assert len(corpus.train["text"]) and "waiting" not in capsys.readouterr().err
    assert not [*tmp_path.rglob("*.lease")]
    (corpus.folder / "meta.json").unlink()
    held = threading.Event()

    def hold() -> None:
        with SoftFileLease(
            corpus.folder.parent / f"{corpus.folder.name}.lease"
        ):  # as another host, that is at it
            held.set()
            time.sleep(0.5)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    assert (
        prepare(config, TokenizerConfig(name="bpe", vocab_size=280)).fingerprint
        == corpus.fingerprint
    )
    assert f"waiting for another process that prepares {corpus.folder}" in capsys.readouterr().err
    thread.join()


def test_a_cache_that_is_read_only_is_used(config, tmp_path, monkeypatch):
    first = prepare(config, TokenizerConfig(name="bpe", vocab_size=280))

    def refuse(path: Path, *_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    for module in (prepared, cache_folders, shards):
        monkeypatch.setattr(module, "write_atomically", refuse)
    for module in (prepared, choose_tokenizer):
        monkeypatch.setattr(module, "locked", refuse)
    config.verify_days = 0
    copy = tmp_path / "copy" / "rows.jsonl"
    copy.parent.mkdir()
    copy.write_bytes(Path(config.path).read_bytes())
    for path in (config.path, str(copy)):
        config.path = path
        assert (
            prepare(config, TokenizerConfig(name="bpe", vocab_size=280)).fingerprint
            == first.fingerprint
        )
    # What the cache lacks cannot be prepared in it.
    config.validation_fraction = 0.4
    with pytest.raises(ValueError, match=r"; set data.cache to a folder that can be written"):
        prepare(config, BYTES)


def test_training_a_tokenizer_is_told_and_ends_at_ctrl_c(tmp_path):
    generator = np.random.default_rng(0)
    path = tmp_path / "letters.txt"
    path.write_text("".join(map(chr, generator.integers(97, 123, 8_000_000))))
    script = (
        "import data.prepare as tool, sys; from data import choose_tokenizer;"
        " choose_tokenizer.SIGN_OF_LIFE = 0.5; tool.main(sys.argv[1:])"
    )
    overrides = [
        "data=text",
        f"data.path={path}",
        f"data.cache={tmp_path}",
        "tokenizer=bpe_32768",
        "data.validation_split=tail",
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *overrides],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr
    assert "training tokenizer=bpe of 32,768 ids on up to " in process.stderr.readline()
    assert " s so far" in process.stderr.readline()
    workers = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert (
        process.returncode == 130
        and out == ""
        and err.endswith("the same command goes on from there\n")
    )
    wait_until(lambda: not any(alive(pid) for pid in workers), 5)


def numbered(vocab_size: int) -> Tokenizer:
    """A tokenizer of that vocabulary, for tokens that are just numbers."""
    return RankedTokenizer(
        "numbered", ".", tuple(index.to_bytes(3, "big") for index in range(vocab_size - 1))
    )


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, "<u2"), (2**16 + 1, "<u4")])
def test_a_shard_is_little_endian_integers_as_wide_as_the_vocabulary_needs(
    tmp_path, vocab_size, dtype
):
    ids = np.array([0, 1, vocab_size - 1, 5])
    write_shard(tmp_path / "a.bin", ids, [0, 3], 7, numbered(vocab_size))
    shard = Shard.open(tmp_path / "a.bin", numbered(vocab_size))
    shard.verify()
    assert shard.tokens.dtype == np.dtype(dtype) and shard.tokens.tolist() == ids.tolist()
    assert (
        shard.documents.tolist() == [0, 3]
        and shard.header.max_token == vocab_size - 1
        and shard.header.num_bytes == 7
    )
    raw = (tmp_path / "a.bin").read_bytes()
    assert raw[128:] == ids.astype(dtype).tobytes() + np.array([0, 3], "<u8").tobytes()


def make_tokens(
    folder: Path, stream: np.ndarray, sizes: list[int], vocab_size: int = 60000
) -> Tokens:
    """A stream of tokens in shards of the sizes, and a last one with the rest."""
    folder.mkdir(exist_ok=True)
    tokenizer = numbered(vocab_size)
    for index, part in enumerate(np.split(stream, np.cumsum(sizes))):
        write_shard(folder / f"{index}.bin", part, [], 3 * len(part), tokenizer)
    return Tokens(
        [Shard.open(folder / f"{index}.bin", tokenizer) for index in range(len(sizes) + 1)]
    )


def test_shards_read_as_one_stream(tmp_path):
    stream = np.random.default_rng(0).integers(0, 60000, 100)
    tokens = make_tokens(tmp_path, stream, [10, 0, 1, 40, 0])
    assert len(tokens) == 100
    for first in range(0, 101):
        for last in range(first, 110):
            assert tokens.read(first, last).tolist() == stream[first:last].tolist()
    assert tokens.read(0, 5).dtype == np.int64
    assert len(make_tokens(tmp_path / "empty", stream[:0], [])) == 0
