import json
import random
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conf.schema import DataConfig, SourceConfig
from data import corpora
from data.corpora import TextCorpus, is_held_out
from data.tokenizer import train_bpe

SHAKESPEARE = Path(__file__).parents[2] / "shared" / "data" / "tinyshakespeare" / "input.txt"
BOOKS = Path(__file__).parents[2] / "shared" / "data" / "books"


def text_config(path=None, **settings) -> DataConfig:
    return DataConfig(name="text", source="text", path=path, **settings)


def read(config: DataConfig) -> dict[str, list[str]]:
    """Part -> its documents, whole again where a file was cut."""
    documents: dict[str, list[str]] = {}
    for piece in TextCorpus(config).pieces():
        for text in piece.texts():
            part = documents.setdefault(text.part, [])
            if text.opens:
                part.append("")
            part[-1] += text.text
    return documents


def write_rows(path: Path, texts: list[str], field: str = "text", row_group_size: int = 7) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"id": range(len(texts)), field: texts}), path, row_group_size=row_group_size)
    else:
        path.write_text("".join(json.dumps({field: text}, ensure_ascii=index % 2 == 0) + "\n" for index, text in enumerate(texts)))
    return str(path)


TEXTS = [f"document {index}: naïve 日本語 🙂\r\nline\n" * (index % 5 + 1) for index in range(60)]


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(corpora, "PIECE_BYTES", 200)


def test_the_standard_library_is_sources_without_tests():
    text = TextCorpus(DataConfig())
    names = {file.name for file in text.sources["stdlib"]}
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= names
    assert not [name for name in names if {"test", "tests", "idle_test", "site-packages", "encodings"} & set(name.split("/")[:-1])]
    assert 5e6 < sum(file.size for file in text.sources["stdlib"]) < 20e6
    assert text.identity == TextCorpus(DataConfig()).identity
    assert len(text.identity["content"]) == 64  # sha256 of the content
    documents = read(DataConfig())
    assert 0.01 < len(documents["validation/validation"]) / len(names) < 0.12
    assert Path(json.__file__).read_text() in documents["train/stdlib"] + documents["validation/validation"]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_documents_are_found_whole_whatever_the_pieces(tmp_path, monkeypatch, kind):
    path = tmp_path / f"all.{kind}"
    if kind == "txt":
        path.write_text("".join(f"{text}<|endoftext|>\n" for text in TEXTS), newline="")
        config = text_config(str(path), separator="<|endoftext|>", validation_fraction=0.3)
    else:
        config = text_config(write_rows(path, TEXTS), validation_fraction=0.3)
    whole = read(config)
    assert sorted(whole["train/text"] + whole["validation/validation"]) == sorted(TEXTS)
    assert 5 < len(whole["validation/validation"]) < 35
    for size in (1, 100, 1000):
        monkeypatch.setattr(corpora, "PIECE_BYTES", size)
        assert len(TextCorpus(config).pieces()) > 1
        assert read(config) == whole


def test_a_separator_is_a_whole_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one <eos>\n<eos> x\n<eos>\r\ntwo\n<eos>\n<eos>\n\nthree\n<eos>")
    documents = read(text_config(str(path), separator="<eos>", validation={"v": str(path)}))
    assert documents["validation/v"] == ["one <eos>\n<eos> x\n", "two\n", "\nthree\n"]
    assert read(text_config(str(path), validation={"v": str(path)}))["validation/v"] == [path.read_bytes().decode()]


def test_what_is_held_out_depends_on_name_and_place_alone(tmp_path):
    for folder in ("here", "there/deeper"):
        (tmp_path / folder).mkdir(parents=True)
        for index in range(40):
            (tmp_path / folder / f"{index}.txt").write_text(f"text {index}")
    here, there = (read(text_config(str(tmp_path / folder / "*.txt"), validation_fraction=0.3)) for folder in ("here", "there/deeper"))
    assert here == there
    held_out = {f"text {index}" for index in range(40) if is_held_out(f"{index}.txt", 0, 0.3)}
    assert set(here["validation/validation"]) == held_out
    assert sum(is_held_out("name", index, 0.05) for index in range(20000)) == pytest.approx(1000, abs=120)


@pytest.mark.parametrize("num_files", [1, 3])
def test_one_document_or_an_empty_split_is_refused(tmp_path, num_files):
    for index in range(num_files):
        (tmp_path / f"{index}.txt").write_text("text")
    with pytest.raises(ValueError, match=r"of \d documents? leaves validation/validation empty; set data.validation_split=tail"):
        TextCorpus(text_config(str(tmp_path / "*.txt"), validation_fraction=1e-6))


def test_the_tail_is_nanogpts():
    if not SHAKESPEARE.exists():
        pytest.skip("no tinyshakespeare here")
    documents = read(text_config(str(SHAKESPEARE), validation_split="tail", validation_fraction=0.1))
    text = SHAKESPEARE.read_text()
    assert documents == {"train/text": [text[:1003854]], "validation/validation": [text[1003854:]]}
    assert len(text[1003854:].encode()) == 111540


def test_the_tail_runs_over_files_and_keeps_characters_whole(tmp_path, small_pieces):
    contents = ["é" * 300, "日本語\n" * 100, "🙂" * 101]
    for index, content in enumerate(contents):
        (tmp_path / f"{index}.txt").write_text(content)
    text = "".join(contents)
    for fraction in (0.05, 0.1, 0.31, 0.5):
        documents = read(text_config([str(tmp_path / f"{index}.txt") for index in range(3)], validation_split="tail", validation_fraction=fraction))
        train, tail = "".join(documents["train/text"]), "".join(documents["validation/validation"])
        assert train + tail == text
        assert 0 <= len(tail.encode()) - fraction * len(text.encode()) <= 5


def test_the_tail_parts_no_separator_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("0123456789\n<|endoftext|>\nabcdefghij\n")
    for percent in range(2, 50):
        documents = read(text_config(str(path), separator="<|endoftext|>", validation_split="tail", validation_fraction=percent / 100))
        assert "".join(documents["train/text"] + documents["validation/validation"]) == "0123456789\nabcdefghij\n"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_tail_of_rows(tmp_path, small_pieces, kind):
    documents = read(text_config(write_rows(tmp_path / f"a.{kind}", TEXTS), validation_split="tail", validation_fraction=0.25))
    train, tail = documents["train/text"], documents["validation/validation"]
    assert train + tail == TEXTS
    assert len(tail) == 15 if kind == "parquet" else 10 < len(tail) < 20
    mixed = [write_rows(tmp_path / "b.jsonl", TEXTS), write_rows(tmp_path / "b.parquet", TEXTS)]
    with pytest.raises(ValueError, match=r"data\.validation_split=tail cannot weigh rows of \.parquet"):
        read(text_config(mixed, validation_split="tail"))


def test_a_document_is_cut_only_where_no_token_lies_across(tmp_path, monkeypatch):
    """A single document in small parts must give the tokens of the whole, whatever white space there is."""
    generator = random.Random(0)
    words = ["the", " cat", "'s", " 12", "\n", "\n", "\n\n", " ", "  ", "\t", "\r\n", "\u3000", "\u00a0", "\u2028", "日本", "é", "...", " \n "]
    text = "".join(generator.choices(words, k=20000))
    (tmp_path / "a.txt").write_text(text, newline="")
    tokenizer = train_bpe([text, text], 300)
    for size in (1, 50, 3000):
        monkeypatch.setattr(corpora, "PIECE_BYTES", size)
        pieces = TextCorpus(text_config(str(tmp_path / "a.txt"), validation={"v": str(tmp_path / "a.txt")})).pieces()
        parts = [part for piece in pieces if piece.part == "train/text" for part in piece.texts()]
        assert len(parts) > 5
        assert [part.opens for part in parts] == [True] + [False] * (len(parts) - 1)
        assert [part.closes for part in parts] == [False] * (len(parts) - 1) + [True]
        assert [i for part in parts for i in tokenizer.encode(part.text)] == tokenizer.encode(text).tolist()


def test_sources_sets_lists_and_globs(tmp_path):
    for name in ("a1", "a2", "b1", "v1", "v2"):
        (tmp_path / f"{name}.txt").write_text(name)
    config = text_config(
        sources={"a": SourceConfig(str(tmp_path / "a*.txt"), 3.0), "b": SourceConfig([str(tmp_path / "b1.txt")])},
        validation={"x": str(tmp_path / "v1.txt"), "y": [str(tmp_path / "v2.txt"), str(tmp_path / "v*.txt")]},
    )
    assert TextCorpus(config).weights == {"a": 3.0, "b": 1.0}
    assert read(config) == {"train/a": ["a1", "a2"], "train/b": ["b1"], "validation/x": ["v1"], "validation/y": ["v2", "v1"]}
    config.validation, config.validation_fraction = {}, 0.5
    config.sources = {name: SourceConfig(write_rows(tmp_path / f"{name}.jsonl", TEXTS)) for name in ("a", "b")}
    assert set(read(config)) == {"train/a", "train/b", "validation/a", "validation/b"}
    assert TextCorpus(text_config(str(tmp_path / "*1.txt"), validation={"v": str(tmp_path / "v1.txt")})).notes()


def test_identity_follows_files_and_split(tmp_path):
    path = tmp_path / "a.jsonl"
    identities = []
    for texts in (TEXTS, TEXTS[::-1]):
        write_rows(path, texts)
        identities += [TextCorpus(text_config(str(path), **settings)).identity for settings in ({}, {"field": "b"}, {"validation_fraction": 0.2})]
    assert len({json.dumps(identity) for identity in identities}) == 6
    settings = {"cache": "elsewhere", "workers": 3}
    assert TextCorpus(text_config(str(path), **settings)).identity == TextCorpus(text_config(str(path))).identity


def test_mistakes_are_named_in_one_line(tmp_path):
    def refused(match: str, config: DataConfig) -> None:
        with pytest.raises(ValueError, match=match) as caught:
            read(config)
        assert "\n" not in str(caught.value)

    def validated(path: str, **settings) -> DataConfig:
        return text_config(path, validation={"v": path}, **settings)

    rows = write_rows(tmp_path / "rows.jsonl", TEXTS)
    refused("data.path=None", text_config())
    refused("give the files to train on in one of the two", text_config(rows, sources={"a": SourceConfig(rows)}))
    refused(r"data.path=.*nowhere\*.txt matches no file", text_config(str(tmp_path / "nowhere*.txt")))
    refused("is a folder", text_config(str(tmp_path)))
    refused("data.validation=v.txt has no names; write data.validation='{NAME: FILES}'", text_config(rows, validation="v.txt"))
    refused("data.path=3 names no files", text_config(3))
    refused("data.validation.v=.*none.txt matches no file", text_config(rows, validation={"v": str(tmp_path / "none.txt")}))
    refused(r"data.sources.a.path=\[\] names no files", text_config(sources={"a": SourceConfig([])}))
    refused("'a/b' in data.sources or data.validation names a folder", text_config(sources={"a/b": SourceConfig(rows)}))
    (tmp_path / "a.csv").write_text("x")
    refused("a.csv is of no known kind; give .txt, .jsonl, .parquet", text_config(str(tmp_path / "a.csv")))
    (tmp_path / "bad.txt").write_bytes(b"fine\nfine\nb\xffd\n")
    refused(r"bad.txt: line 3 is not UTF-8 \(byte 11\)", validated(str(tmp_path / "bad.txt")))
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n\n{"text": \n')
    refused("bad.jsonl: line 3 is not JSON", validated(str(tmp_path / "bad.jsonl")))
    (tmp_path / "null.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    refused("null.jsonl: line 2 has no text in field 'text'; set data.field", validated(str(tmp_path / "null.jsonl")))
    refused("rows.jsonl: line 1 has no text in field 'body'; set data.field", validated(rows, field="body"))
    columns = write_rows(tmp_path / "rows.parquet", TEXTS, "content")
    refused("rows.parquet: no field 'text'; set data.field .* of id, content", validated(columns))
    refused("rows.parquet: row 0 has no text in field 'id'", validated(columns, field="id"))
    (tmp_path / "bad.parquet").write_bytes(b"no parquet at all")
    refused("bad.parquet: not a parquet file", validated(str(tmp_path / "bad.parquet")))


def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b \\ud83d\\ude42"}\n')
    path = str(tmp_path / "a.jsonl")
    assert read(text_config(path, validation={"v": path}))["train/text"] == ["a\ufffdb 🙂"]


def test_heavy_libraries_wait_until_they_are_used():
    import subprocess

    code = "import sys, data; print(*{'torch', 'datasets', 'tokenizers', 'pyarrow', 'tqdm', 'tiktoken'} & set(sys.modules))"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout.strip() == ""


def test_books_have_documents():
    if not BOOKS.exists():
        pytest.skip("no books here")
    path = str(BOOKS / "valid.txt")
    documents = read(text_config(path, separator="<|endoftext|>", validation={"v": path}))["train/text"]
    assert len(documents) == 35
    assert "".join(text + "<|endoftext|>\n" for text in documents) == (BOOKS / "valid.txt").read_bytes().decode()
