"""Datasets of Hugging Face, streamed by the real library out of local folders: what comes out, what
is kept, what is said."""

import gzip
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conf.text import DataConfig
from data import hub, hub_stream, prepare, prepared
from data.hub import HubCorpus
from data.hub_stream import HubStream
from data.rows import is_held_out
from data.tokenizer import bytes_tokenizer
from launch.config import compose
from launch.run.identity import canonical
from tests.test_corpora import BAD_LINES, latin_1, text_config
from tests.test_shards import BYTES, ROOT, alive, contents, descendants, finish, wait_until

# Prepares argv[1:] = folder, cache, tokenizer, workers in many small pieces, and prints the
# fingerprint.
PREPARE = """
import sys
from conf.text import DataConfig, TokenizerConfig
from data import hub, hub_stream, prepare

path, cache, name, workers = sys.argv[1:]
hub.PIECE_BYTES = 40_000
hub_stream.BATCH = 16
data = DataConfig(
    source="hub", path=path, cache=cache, workers=int(workers), validation_fraction=0.2
)
print(prepare(data, TokenizerConfig(name=name, vocab_size=400, train_megabytes=0.2)).fingerprint)
"""


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.getbasetemp() / "huggingface"))


def texts_of(number: int, seed: int = 0) -> list[str]:
    generator = np.random.default_rng(seed)
    words = [f"w{index}é" for index in range(500)]
    return [" ".join(generator.choice(words, 200)) for _ in range(number)]


def write_dataset(
    folder: Path, kind: str, files: list[list[str | None]], split: str = "train"
) -> Path:
    """A folder as they lie on the hub: files <split>-00000-of-00003 of rows with a text and other
    columns."""
    folder.mkdir(exist_ok=True)
    for index, texts in enumerate(files):
        path = folder / f"{split}-{index:05d}-of-{len(files):05d}"
        if kind == "parquet":
            table = pa.table({"id": range(len(texts)), "text": pa.array(texts, pa.string())})
            pq.write_table(table, path.with_suffix(".parquet"), row_group_size=50)
        else:
            rows = "".join(json.dumps({"url": f"u{index}", "text": text}) + "\n" for text in texts)
            path.with_suffix(".json.gz").write_bytes(gzip.compress(rows.encode()))
    return folder


def hub_config(path, cache, **settings) -> DataConfig:
    return DataConfig(name="hub", source="hub", path=str(path), cache=str(cache), **settings)


def start(*arguments) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE, *map(str, arguments)], cwd=ROOT, **pipes
    )


def documents(tokens) -> list[str]:
    return bytes_tokenizer().decode(tokens.read(0, len(tokens))).split("<|endoftext|>")[:-1]


@pytest.mark.parametrize("kind", ["parquet", "json.gz"])
def test_what_is_prepared_is_the_stream(tmp_path, monkeypatch, kind):
    files = [["one 日本", "", None, "two"], ["three"], [f"text {index}" for index in range(200)]]
    folder = write_dataset(tmp_path / "set", kind, files)
    config = hub_config(folder, tmp_path / "cache", validation_fraction=0.2)
    with pytest.raises(
        ValueError,
        match=(
            r"train-00000-of-00003\..*: (row 2|line 3) has no text in field 'text': it is null;"
            r" mend or remove it, or set"
        ),
    ):
        prepare(config, BYTES)
    config.bad_rows = "skip"
    corpus = prepare(config, BYTES)
    assert corpus.meta["skipped"] == {"train/hub": 1}
    held_out = [
        text
        for file, texts in enumerate(files)
        for row, text in enumerate(texts)
        if text and is_held_out(str(file), row, 0.2)
    ]
    kept = [text for texts in files for text in texts if text and text not in held_out]
    assert (
        documents(corpus.train["hub"]) == kept
        and documents(corpus.validation["validation"]) == held_out
    )
    assert 20 < len(held_out) < 65
    assert corpus.train["hub"].num_bytes == sum(len(text.encode()) for text in kept)
    monkeypatch.setattr(hub_stream, "BATCH", 3)
    monkeypatch.setattr(hub, "PIECE_BYTES", 100)
    again = prepare(
        hub_config(folder, tmp_path / "other", validation_fraction=0.2, workers=1, bad_rows="skip"),
        BYTES,
    )
    assert again.meta["parts"]["train/hub"]["shards"] > 10
    assert (
        documents(again.train["hub"]) == kept
        and documents(again.validation["validation"]) == held_out
    )


def test_splits_fields_and_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(hub_stream, "BATCH", 4)
    folder = write_dataset(tmp_path / "set", "parquet", [["a", "b", "c"], ["d", "e"]])
    write_dataset(folder, "parquet", [["v", "w"]], "validation")
    write_dataset(folder, "parquet", [["t"]], "test")
    named = {"x": "validation", "y": "validation+test"}
    corpus = prepare(hub_config(folder, tmp_path, split="train+test", validation=named), BYTES)
    assert documents(corpus.train["hub"]) == ["a", "b", "c", "d", "e", "t"]
    assert {name: documents(tokens) for name, tokens in corpus.validation.items()} == {
        "x": ["v", "w"],
        "y": ["v", "w", "t"],
    }
    for limit in (1, 3, 4, 9):
        config = hub_config(folder, tmp_path, documents=limit, validation=named)
        corpus = prepare(config, BYTES)
        assert documents(corpus.train["hub"]) == list("abcde")[:limit]
        assert documents(corpus.validation["x"]) == ["v", "w"]
        journal = corpus.folder / "train/hub/pieces.jsonl"
        # killed after the last shard
        journal.write_text(journal.read_text().removesuffix("null\n"))
        (corpus.folder / "meta.json").unlink()
        assert prepare(config, BYTES).fingerprint == corpus.fingerprint


@pytest.fixture(scope="module")
def many_rows(tmp_path_factory) -> Path:
    texts = texts_of(900)
    return write_dataset(
        tmp_path_factory.mktemp("many") / "set",
        "parquet",
        [texts[:250], texts[250:600], texts[600:]],
    )


@pytest.fixture(scope="module")
def uninterrupted(many_rows, tmp_path_factory) -> tuple[str, dict[str, bytes]]:
    cache = tmp_path_factory.mktemp("cache")
    out, _ = finish(start(many_rows, cache, "bpe", 1))
    return out, contents(cache)


def test_a_killed_preparation_is_taken_up_and_ends_with_the_same_bytes(
    many_rows, uninterrupted, tmp_path
):
    kept: dict[Path, int] = {}
    num_hits = 0
    for num_shards in (1, 12, 30):  # the moment of each SIGKILL: so many shards are there
        process = start(many_rows, tmp_path, "bpe", 2)
        wait_until(
            lambda n=num_shards, p=process: (
                len(list(tmp_path.rglob("*.bin"))) >= n or p.poll() is not None
            )
        )
        workers = descendants(process.pid)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        num_hits += not list(tmp_path.rglob("meta.json"))
        wait_until(lambda: not any(alive(pid) for pid in workers), 10)  # noqa: B023
        assert all(path.stat().st_mtime_ns == mtime for path, mtime in kept.items()), (
            "a finished shard was made again"
        )
        # a piece makes two shards, and is made again if it has but one
        names = [path.name for path in tmp_path.rglob("*.bin")]
        kept = {
            path: path.stat().st_mtime_ns
            for path in tmp_path.rglob("*.bin")
            if names.count(path.name) == 2
        }
    assert num_hits >= 2
    out, _ = finish(start(many_rows, tmp_path, "bpe", 2))
    assert (out, contents(tmp_path)) == uninterrupted


def test_files_that_are_done_are_not_read_again(many_rows, tmp_path, monkeypatch):
    """Half of a preparation, made of a stream that breaks: what is taken up begins with the file
    where it broke."""
    monkeypatch.setattr(hub, "PIECE_BYTES", 40_000)
    monkeypatch.setattr(hub_stream, "BATCH", 16)
    config, opened = hub_config(many_rows, tmp_path / "cache", workers=1), []
    files = HubStream.files

    def note(self, split, first):
        for index, *rest in files(self, split, first):
            opened.append(index)
            yield index, *rest

    monkeypatch.setattr(HubStream, "files", note)
    last = many_rows / "train-00002-of-00003.parquet"
    content, stat = last.read_bytes(), last.stat()
    whole = prepare(config, BYTES)
    shutil.rmtree(tmp_path / "cache")
    opened.clear()
    try:
        damage = bytearray(content)
        damage[len(content) // 2 : len(content) // 2 + 2000] = b"\xff" * 2000
        last.write_bytes(damage)
        os.utime(last, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        with pytest.raises(
            ValueError,
            match=(
                r"\(train, row \d+ or soon after of file 2: .*00002-of-00003.parquet\) cannot be"
                r" read: .*what is prepared is kept"
            ),
        ) as caught:
            prepare(config, BYTES)
    finally:
        last.write_bytes(content)
        os.utime(last, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert "\n" not in str(caught.value)
    assert opened == [0, 1, 2]
    assert prepare(config, BYTES).fingerprint == whole.fingerprint
    assert opened[3:] in ([1, 2], [2])  # the last whole piece may end in the file before
    journal = next((tmp_path / "cache").rglob("train/hub/pieces.jsonl"))
    before = contents(tmp_path / "cache")
    journal.write_text(journal.read_text()[:-30])  # cut off, as the machine went down
    (journal.parent / "00003.bin").unlink()
    assert prepare(config, BYTES).fingerprint == whole.fingerprint
    assert contents(tmp_path / "cache") == before


def test_mistakes_are_named_in_one_line(tmp_path, monkeypatch):
    folder = write_dataset(tmp_path / "set", "parquet", [["a", "b"]])

    def refused(match: str, **settings) -> None:
        with pytest.raises(ValueError, match=match) as caught:
            prepare(hub_config(settings.pop("path", folder), tmp_path / "cache", **settings), BYTES)
        assert "\n" not in str(caught.value)

    refused("data.path= names no dataset", path="")
    refused(
        "data.validation=3 names no splits; write data.validation=SPLIT or '{NAME: SPLIT}'",
        validation=3,
    )
    refused("'a/b' in data.validation names a folder", validation={"a/b": "train"})
    refused(r"\(valid\) cannot be read: .*valid.*; check data.config, data.split", split="valid")
    refused(r"cannot be read: .*'en'.*; check data.config", config="en")
    refused("data.field=body: .* has no such field; choose one of id, text", field="body")
    refused(
        "data.field=id holds int64, not text; set data.field to the field that holds the text",
        field="id",
    )
    write_dataset(tmp_path / "set [v2]", "parquet", [["a"]])
    refused(
        r"set \[v2\]: `datasets` takes \[ \] \* \? in a folder's name for a pattern; give a link"
        r" to it",
        path=tmp_path / "set [v2]",
    )
    refused(
        r"data.path=/no/such/set is no folder; give the folder of a dataset, or its name on"
        r" the hub",
        path="/no/such/set",
    )
    refused(
        "data.validation_fraction=1e-09 of 2 documents leaves validation/validation empty, and"
        " data=hub holds out random rows only; raise it, or name a split in data.validation, or"
        " read the folder by data=text, which then holds out its tail",
        validation_fraction=1e-9,
    )
    refused(
        "; raise it, or raise data.documents, or name a split in data.validation, or read",
        validation_fraction=1e-9,
        documents=2,
    )
    write_dataset(tmp_path / "single", "parquet", [["a"]])
    refused(
        "of 1 document leaves .* rows only; name a split in data.validation, or read",
        path=tmp_path / "single",
    )
    write_dataset(tmp_path / "empty", "parquet", [[""]])
    refused(
        "train/hub has no text; give a split with some",
        path=tmp_path / "empty",
        validation={"v": "train"},
    )


@pytest.mark.parametrize("offline", ["1", ""])
def test_a_name_without_a_network_is_refused_at_once(tmp_path, offline):
    """In a process of its own: huggingface_hub looks at HF_HUB_OFFLINE when it is imported."""
    code = (
        f"from tests.test_hub import *; prepare(hub_config('allenai/c4', {str(tmp_path)!r},"
        " config='en'), BYTES)"
    )
    variables = {
        name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")
    }
    variables |= {
        "HF_HUB_OFFLINE": offline,
        "HF_HOME": str(tmp_path),
        "HF_ENDPOINT": "http://127.0.0.1:9",
    }
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=90,
    )
    said = process.stderr.splitlines()[-1]
    assert "ValueError: data.path=allenai/c4 (train) cannot be read: " in said
    assert (
        "check data.config, data.split and the network, or use a data.cache that was prepared where"
        " there is one" in said
    )


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's interface as streaming asks for: the commit of some/thing, the files of
    a folder, their bytes."""

    root: Path
    requests: ClassVar[list[str]] = []
    commit = "c" * 40

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        self.requests.append(path)
        if re.fullmatch(rf"/api/datasets/some/thing(/revision/{self.commit})?", path):
            self.answer(
                json.dumps(
                    {"id": "some/thing", "sha": self.commit, "tags": [], "siblings": []}
                ).encode()
            )
        elif found := re.fullmatch(rf"/api/datasets/some/thing/tree/{self.commit}/?(.*)", path):
            kinds = [
                (file, "file" if file.is_file() else "directory")
                for file in sorted((self.root / found[1]).glob("*"))
            ]
            rows = [
                {
                    "type": kind,
                    "path": str(file.relative_to(self.root)),
                    "size": file.stat().st_size,
                    "oid": "0" * 40,
                }
                for file, kind in kinds
            ]
            self.answer(json.dumps(rows).encode())
        elif (
            found := re.fullmatch(rf"/datasets/some/thing/resolve/{self.commit}/(.*)", path)
        ) and (self.root / found[1]).is_file():
            content, span = (self.root / found[1]).read_bytes(), self.headers.get("Range", "")
            first, last = (
                (
                    int(bound or len(content))
                    for bound in re.fullmatch(r"bytes=(\d+)-(\d*)", span).groups()
                )
                if span
                else (0, len(content))
            )
            partial = (
                {"Content-Range": f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"}
                if span
                else {}
            )
            self.answer(
                content[first : last + 1],
                206 if span else 200,
                {"ETag": '"x"', "X-Repo-Commit": self.commit, **partial},
            )
        else:
            self.answer(b"{}", 404, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def answer(
        self, content: bytes, code: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def test_a_dataset_on_a_hub_is_read_at_one_commit_and_then_needs_no_network(tmp_path, monkeypatch):
    folder = tmp_path / "repository"
    write_dataset(folder, "json.gz", [["not these"]])
    texts = texts_of(20)
    (folder / "en").mkdir()
    for split, files in (("c4-train", [texts[:12], texts[12:]]), ("c4-validation", [["v", "w"]])):
        write_dataset(folder / "en", "json.gz", files, split)
    splits = "".join(
        f"\n  - split: {split}\n    path: en/c4-{split}*.json.gz"
        for split in ("train", "validation")
    )
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: en\n  data_files:{splits}\n---\n"
    )
    monkeypatch.setattr(Hub, "root", folder, raising=False)
    overrides = ["data=c4", "data.path=some/thing", f"data.cache={tmp_path / 'cache'}"]

    def run(port: int) -> str:
        variables = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{port}",
            "HF_HOME": str(tmp_path / "huggingface"),
        }
        command = [sys.executable, "-m", "data.prepare", *overrides]
        return subprocess.run(
            command, cwd=ROOT, env=variables, check=True, capture_output=True, text=True
        ).stdout

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        said = run(server.server_port)
        server.shutdown()
    assert (
        f"train/hub: {sum(len(text.encode()) + 1 for text in texts):,} tokens, 20 documents" in said
    )
    assert "validation/validation: 4 tokens, 2 documents" in said
    assert Hub.requests.count("/api/datasets/some/thing") == 1
    assert next((tmp_path / "cache").glob("hub-*.revision")).read_text() == Hub.commit
    assert run(9).splitlines()[:2] == said.splitlines()[:2]


@pytest.mark.parametrize("name", ["c4", "fineweb_edu", "openwebtext"])
def test_presets_compose(name):
    config = compose([f"data={name}", "tokenizer=gpt2"])
    text = HubCorpus(config.data)
    assert HubCorpus(compose([f"data={name}", "data.validation={x: test}"]).data).named == {
        "x": "test"
    }
    assert text.sources == {"hub": "train"} and text.local is None and "/" in config.data.path
    assert set(text.named) == ({"validation"} if name == "c4" else set())
    keys = "name source path config split revision documents field validation validation_fraction"
    assert {key for key in canonical(config) if key.startswith("data.")} == {
        f"data.{key}" for key in keys.split()
    }


def test_what_is_about_a_dataset_is_no_part_of_it(tmp_path, monkeypatch):
    folder = write_dataset(tmp_path / "set", "parquet", [["a", "b"], ["c"]])
    for name in (
        ".git/index",
        ".cache/huggingface/download/x.metadata",
        "README.md",
        "LICENSE",
        ".gitattributes",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("before")
    first = prepare(hub_config(folder, tmp_path / "cache", validation={"v": "train"}), BYTES)
    for name in (".git/index", "README.md", ".DS_Store", ".git/objects/ab/new"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("after, and longer")
    with monkeypatch.context() as patched:
        patched.setattr(prepared, "fill", None)
        assert (
            prepare(hub_config(folder, tmp_path / "cache", validation={"v": "train"}), BYTES).folder
            == first.folder
        )
        shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)  # of another time
        assert (
            prepare(
                hub_config(tmp_path / "copy", tmp_path / "cache", validation={"v": "train"}), BYTES
            ).folder
            == first.folder
        )
        shutil.rmtree(folder)
        assert (
            prepare(hub_config(folder, tmp_path / "cache", validation={"v": "train"}), BYTES).folder
            == first.folder
        )
    text = HubCorpus(hub_config(tmp_path / "copy", tmp_path))
    content = text.identify(list)
    # says what the rows are
    (tmp_path / "copy" / "README.md").write_text("---\nconfigs:\n- config_name: en\n---\n")
    assert text.identify(list) != content


@pytest.mark.parametrize("kind", [pa.string_view(), pa.binary(), pa.large_string()])
def test_any_column_of_text_is_streamed(tmp_path, kind):
    folder = write_dataset(tmp_path / "set", "parquet", [["x"]])
    pq.write_table(
        pa.table({"text": pa.array(["abc", "é"]).cast(kind)}), next(folder.glob("*.parquet"))
    )
    assert documents(
        prepare(hub_config(folder, tmp_path, validation={"v": "train"}), BYTES).train["hub"]
    ) == ["abc", "é"]


def test_latin_1_in_a_dataset_is_named_or_skipped(tmp_path):
    folder = write_dataset(tmp_path / "set", "parquet", [["x"], ["y"]])
    path = folder / "train-00001-of-00002.parquet"
    pq.write_table(pa.table({"text": latin_1(pa.string())}), path)
    config = hub_config(folder, tmp_path, validation={"v": "train"})
    with pytest.raises(
        ValueError,
        match=(
            rf"{path}: row 1 is not UTF-8 in field 'text' \(byte 3 of the text\); mend or remove it"
        ),
    ):
        prepare(config, BYTES)
    config.bad_rows = "skip"
    assert documents(prepare(config, BYTES).train["hub"]) == ["x", "ok", "end"]


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_of_a_dataset_is_named_or_skipped(tmp_path, line, zipped):
    """As a local one is: `datasets` gives up on a whole file, or makes JSON of every text in it."""
    (tmp_path / "set").mkdir()
    good = [json.dumps({"text": f"row {index}"}) for index in range(40)]
    content = "\n".join([*good[:20], "", line, *good[20:]]).encode(errors="surrogateescape")
    path = tmp_path / "set" / ("train.jsonl.gz" if zipped else "train.jsonl")
    path.write_bytes(gzip.compress(content) if zipped else content)
    config = hub_config(tmp_path / "set", tmp_path / "cache", validation={"v": "train"})
    with pytest.raises(ValueError, match=rf"{path}: line 22 {BAD_LINES[line]}") as caught:
        prepare(config, BYTES)
    assert "\n" not in str(caught.value)
    config.bad_rows = "skip"
    corpus = prepare(config, BYTES)
    assert documents(corpus.train["hub"]) == [f"row {index}" for index in range(40)]
    assert corpus.meta["skipped"] == {"train/hub": 1, "validation/v": 1}
    assert corpus.meta["first_skipped"].startswith(f"{path}: line 22 ")


GOOD_LINES = {
    '{"text": "ok", "id": ' + "9" * 5000 + "}": "ok",
    '{"text": "half a \\ud800 pair"}': "half a \ufffd pair",
    '\ufeff{"text": "marked"}': "marked",
    '{"text": "\ufeffmarked"}': "marked",
    '{"text": "first", "text": "last"}': "last",
    '{"text": "no number", "id": NaN}': "no number",
    '{"text": "nul \\u0000", "id": 1}\r': "nul \0",
}


@pytest.mark.parametrize("line", GOOD_LINES)
def test_a_line_is_read_alike_in_a_dataset_and_in_a_file(tmp_path, line, monkeypatch):
    monkeypatch.setattr(hub_stream, "BLOCK_BYTES", 7)
    (tmp_path / "set").mkdir()
    path = tmp_path / "set" / "train.jsonl"
    path.write_bytes(f'{{"text": "before"}}\n{line}\n\n{{"text": "after"}}'.encode())
    config = hub_config(tmp_path / "set", tmp_path / "cache", validation={"v": "train"})
    expected = ["before", GOOD_LINES[line], "after"]
    assert documents(prepare(config, BYTES).train["hub"]) == expected
    files = text_config(str(path), validation={"v": str(path)}, cache=str(tmp_path / "cache"))
    assert documents(prepare(files, BYTES).train["text"]) == expected


@pytest.mark.parametrize(
    "content",
    ['[{"text": "one"}, {"text": "two"}]', '[\n{"text": "one"},\n{"text": "two"}]', "\ufeff["],
)
def test_json_that_is_one_list_is_read_by_the_library(tmp_path, content):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.json").write_text(content)
    config = hub_config(tmp_path / "set", tmp_path / "cache", validation={"v": "train"})
    if content.endswith("]"):
        assert documents(prepare(config, BYTES).train["hub"]) == ["one", "two"]
    else:
        with pytest.raises(ValueError, match=r"train.*cannot be read: .*; check data.config"):
            prepare(config, BYTES)


def test_a_folder_with_a_script_has_a_remedy(tmp_path):
    (tmp_path / "F").mkdir()
    (tmp_path / "F" / "F.py").write_text("import datasets\n")
    with pytest.raises(
        ValueError,
        match=(
            r"scripts are no longer supported.*; save its rows as \.parquet or \.jsonl files,"
            r" without the script"
        ),
    ):
        prepare(hub_config(tmp_path / "F", tmp_path / "cache"), BYTES)
    named = HubStream(hub_config("some/thing", tmp_path), None, "hub-x.revision")
    assert named._remedy("Dataset scripts are no longer supported, but found x.py").startswith(
        "set data.revision=refs/convert/parquet"
    )


def test_splits_that_hold_the_same_are_noticed(tmp_path, capsys):
    folder = write_dataset(tmp_path / "set", "parquet", [texts_of(30)])
    write_dataset(folder, "parquet", [texts_of(30)], "validation")
    prepare(hub_config(folder, tmp_path, validation={"same": "train", "copy": "validation"}), BYTES)
    said = capsys.readouterr().err
    assert "note: data.validation.same=train is trained on: data.split=train" in said
    assert "note: about 100% of validation/copy is in the training text too, as " in said


def test_identity_follows_what_is_asked_for(tmp_path):
    folder = write_dataset(tmp_path / "set", "parquet", [["a"]])
    variants = [
        {},
        {"split": "x"},
        {"field": "x"},
        {"documents": 1},
        {"config": "x"},
        {"validation": {"v": "x"}},
        {"validation_fraction": 0.1},
    ]
    identities = [
        HubCorpus(hub_config(folder, tmp_path, **settings)).identity for settings in variants
    ]
    identities += [
        HubCorpus(hub_config("a/b", tmp_path, revision=revision)).identity
        for revision in (None, "x")
    ]
    assert len({json.dumps(identity) for identity in identities}) == 9
    assert (
        identities[0] == HubCorpus(hub_config(folder, tmp_path / "elsewhere", workers=3)).identity
    )
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copy2)
    assert identities[0] == HubCorpus(hub_config(tmp_path / "copy", tmp_path)).identity
