import gzip
import json
import os
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import train
from conf.text import DataConfig, SourceConfig, TokenizerConfig
from data import pieces, prepare
from data.checks import check_data
from data.corpora import TextCorpus
from data.overlap import print_note
from data.rows import is_held_out
from data.source_files import source_weights
from data.tokenizer import train_bpe
from launch.config import compose

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
        pq.write_table(
            pa.table({"id": range(len(texts)), field: texts}), path, row_group_size=row_group_size
        )
    else:
        path.write_text(
            "".join(
                json.dumps({field: text}, ensure_ascii=index % 2 == 0) + "\n"
                for index, text in enumerate(texts)
            )
        )
    return str(path)


TEXTS = [f"document {index}: naïve 日本語 🙂\r\nline\n" * (index % 5 + 1) for index in range(60)]


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 200)


def test_the_standard_library_is_sources_without_tests():
    text = TextCorpus(DataConfig())
    names = {file.name for file in text.sources["stdlib"]}
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= names
    assert not [
        name
        for name in names
        if {"test", "tests", "idle_test", "site-packages", "encodings"} & set(name.split("/")[:-1])
    ]
    assert 5e6 < sum(file.size for file in text.sources["stdlib"]) < 20e6
    assert text.identity == TextCorpus(DataConfig()).identity
    assert len(text.identity["content"]) == 64  # sha256 of the content
    documents = read(DataConfig())
    assert 0.01 < len(documents["validation/validation"]) / len(names) < 0.12
    assert (
        Path(json.__file__).read_text()
        in documents["train/stdlib"] + documents["validation/validation"]
    )


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
        monkeypatch.setattr(pieces, "PIECE_BYTES", size)
        assert len(TextCorpus(config).pieces()) > 1
        assert read(config) == whole


def test_a_separator_is_a_whole_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one <eos>\n<eos> x\n<eos>\r\ntwo\n<eos>\n<eos>\n\nthree\n<eos>")
    documents = read(text_config(str(path), separator="<eos>", validation={"v": str(path)}))
    assert documents["validation/v"] == ["one <eos>\n<eos> x\n", "two\n", "\nthree\n"]
    assert read(text_config(str(path), validation={"v": str(path)}))["validation/v"] == [
        path.read_bytes().decode()
    ]


def test_what_is_held_out_depends_on_name_and_place_alone(tmp_path):
    for folder in ("here", "there/deeper"):
        (tmp_path / folder).mkdir(parents=True)
        for index in range(40):
            (tmp_path / folder / f"{index}.txt").write_text(f"text {index}")
    here, there = (
        read(text_config(str(tmp_path / folder / "*.txt"), validation_fraction=0.3))
        for folder in ("here", "there/deeper")
    )
    assert here == there
    held_out = {f"text {index}" for index in range(40) if is_held_out(f"{index}.txt", 0, 0.3)}
    assert set(here["validation/validation"]) == held_out
    assert sum(is_held_out("name", index, 0.05) for index in range(20000)) == pytest.approx(
        1000, abs=120
    )


@pytest.mark.parametrize("num_files", [1, 3])
def test_whole_files_that_chance_does_not_part_give_their_tail(tmp_path, num_files):
    for index in range(num_files):
        (tmp_path / f"{index}.txt").write_text("text" * 10)
    text = TextCorpus(text_config(str(tmp_path / "*.txt"), validation_fraction=0.1))
    assert text.warnings == [
        f"data.validation_fraction=0.1 of {num_files} document{'s' * (num_files > 1)} leaves"
        " validation/validation empty, so the tail of the text is held out, as"
        " data.validation_split=tail does"
    ]
    config = text_config(str(tmp_path / "*.txt"), validation_fraction=0.1, validation_split="tail")
    assert text.identity == TextCorpus(config).identity and TextCorpus(config).warnings == []


def test_the_tail_is_nanogpts():
    if not SHAKESPEARE.exists():
        pytest.skip("no tinyshakespeare here")
    documents = read(
        text_config(str(SHAKESPEARE), validation_split="tail", validation_fraction=0.1)
    )
    text = SHAKESPEARE.read_text()
    assert documents == {"train/text": [text[:1003854]], "validation/validation": [text[1003854:]]}
    assert len(text[1003854:].encode()) == 111540


def test_the_tail_runs_over_files_and_keeps_characters_whole(tmp_path, small_pieces):
    contents = ["é" * 300, "日本語\n" * 100, "🙂" * 101]
    for index, content in enumerate(contents):
        (tmp_path / f"{index}.txt").write_text(content)
    text = "".join(contents)
    for fraction in (0.05, 0.1, 0.31, 0.5):
        documents = read(
            text_config(
                [str(tmp_path / f"{index}.txt") for index in range(3)],
                validation_split="tail",
                validation_fraction=fraction,
            )
        )
        train, tail = "".join(documents["train/text"]), "".join(documents["validation/validation"])
        assert train + tail == text
        assert 0 <= len(tail.encode()) - fraction * len(text.encode()) <= 5


def test_a_separator_that_the_text_does_not_hold_is_told(tmp_path):
    path = tmp_path / "documents.txt"
    path.write_text("one\n[SEP]\ntwo\n")
    config = text_config(str(path), validation={"v": str(path)})
    assert TextCorpus(replace(config, separator="[SEP]")).warnings == []
    assert TextCorpus(replace(config, separator="[a,b]")).warnings == [
        "data.separator='[a,b]' is no line of the text, so that each file is one document"
        " (seen: the first 16 MB of 1 files)"
    ]


def test_the_tail_parts_no_separator_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("0123456789\n<|endoftext|>\nabcdefghij\n")
    for percent in range(2, 50):
        documents = read(
            text_config(
                str(path),
                separator="<|endoftext|>",
                validation_split="tail",
                validation_fraction=percent / 100,
            )
        )
        assert (
            "".join(documents["train/text"] + documents["validation/validation"])
            == "0123456789\nabcdefghij\n"
        )


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_tail_of_rows(tmp_path, small_pieces, kind):
    documents = read(
        text_config(
            write_rows(tmp_path / f"a.{kind}", TEXTS),
            validation_split="tail",
            validation_fraction=0.25,
        )
    )
    train, tail = documents["train/text"], documents["validation/validation"]
    assert train + tail == TEXTS
    assert len(tail) == 15 if kind == "parquet" else 10 < len(tail) < 20
    mixed = [write_rows(tmp_path / "b.jsonl", TEXTS), write_rows(tmp_path / "b.parquet", TEXTS)]
    with pytest.raises(
        ValueError, match=r"data\.validation_split=tail cannot weigh rows of \.parquet"
    ):
        read(text_config(mixed, validation_split="tail"))


def test_a_document_is_cut_only_where_no_token_lies_across(tmp_path, monkeypatch):
    """A single document in small parts must give the tokens of the whole, whatever white space
    there is."""
    generator = random.Random(0)
    words = [
        "the",
        " cat",
        "'s",
        " 12",
        "\n",
        "\n",
        "\n\n",
        " ",
        "  ",
        "\t",
        "\r\n",
        "\u3000",
        "\u00a0",
        "\u2028",
        "日本",
        "é",
        "...",
        " \n ",
    ]
    text = "".join(generator.choices(words, k=20000))
    (tmp_path / "a.txt").write_text(text, newline="")
    tokenizer = train_bpe([text, text], 300)
    for size in (1, 50, 3000):
        monkeypatch.setattr(pieces, "PIECE_BYTES", size)
        found = TextCorpus(
            text_config(str(tmp_path / "a.txt"), validation={"v": str(tmp_path / "a.txt")})
        ).pieces()
        parts = [part for piece in found if piece.part == "train/text" for part in piece.texts()]
        assert len(parts) > 5
        assert [part.opens for part in parts] == [True] + [False] * (len(parts) - 1)
        assert [part.closes for part in parts] == [False] * (len(parts) - 1) + [True]
        assert [i for part in parts for i in tokenizer.encode(part.text)] == tokenizer.encode(
            text
        ).tolist()


def test_sources_sets_lists_and_globs(tmp_path):
    for name in ("a1", "a2", "b1", "v1", "v2"):
        (tmp_path / f"{name}.txt").write_text(name)
    config = text_config(
        sources={
            "a": SourceConfig(str(tmp_path / "a*.txt"), 3.0),
            "b": SourceConfig([str(tmp_path / "b1.txt")]),
        },
        validation={
            "x": str(tmp_path / "v1.txt"),
            "y": [str(tmp_path / "v2.txt"), str(tmp_path / "v*.txt")],
        },
    )
    assert source_weights(config) == {"a": 3.0, "b": 1.0}
    assert read(config) == {
        "train/a": ["a1", "a2"],
        "train/b": ["b1"],
        "validation/x": ["v1"],
        "validation/y": ["v2", "v1"],
    }
    config.validation, config.validation_fraction = {}, 0.5
    config.sources = {
        name: SourceConfig(write_rows(tmp_path / f"{name}.jsonl", TEXTS)) for name in ("a", "b")
    }
    assert set(read(config)) == {"train/a", "train/b", "validation/a", "validation/b"}


def test_identity_follows_files_and_split(tmp_path):
    path = tmp_path / "a.jsonl"
    identities = []
    for texts in (TEXTS, TEXTS[::-1]):
        write_rows(path, texts)
        identities += [
            TextCorpus(text_config(str(path), **settings)).identity
            for settings in ({}, {"field": "b"}, {"validation_fraction": 0.2})
        ]
    assert len({json.dumps(identity) for identity in identities}) == 6
    settings = {"cache": "elsewhere", "workers": 3}
    assert (
        TextCorpus(text_config(str(path), **settings)).identity
        == TextCorpus(text_config(str(path))).identity
    )


def test_mistakes_are_named_in_one_line(tmp_path):
    def refused(match: str, config: DataConfig) -> None:
        with pytest.raises(ValueError, match=match) as caught:
            read(config)
        assert "\n" not in str(caught.value)

    def validated(path: str, **settings) -> DataConfig:
        return text_config(path, validation={"v": path}, **settings)

    rows = write_rows(tmp_path / "rows.jsonl", TEXTS)
    refused("data.path=None", text_config())
    refused(
        "give the files to train on in one of the two",
        text_config(rows, sources={"a": SourceConfig(rows)}),
    )
    refused(
        r"data.path=.*nowhere\*.txt matches no file", text_config(str(tmp_path / "nowhere*.txt"))
    )
    (tmp_path / "empty").mkdir()
    refused("empty holds no .txt, .jsonl, .parquet file", text_config(str(tmp_path / "empty")))
    refused(
        "data.validation=v.txt has no names; write data.validation='{NAME: FILES}'",
        text_config(rows, validation="v.txt"),
    )
    refused("data.path=3 names no files", text_config(3))
    refused(
        "data.validation.v=.*none.txt matches no file",
        text_config(rows, validation={"v": str(tmp_path / "none.txt")}),
    )
    refused(
        r"data.sources.a.path=\[\] names no files", text_config(sources={"a": SourceConfig([])})
    )
    refused(
        "'a/b' in data.sources or data.validation names a folder",
        text_config(sources={"a/b": SourceConfig(rows)}),
    )
    (tmp_path / "a.csv").write_text("x")
    refused(
        "a.csv is of no known kind; give .txt, .jsonl, .parquet",
        text_config(str(tmp_path / "a.csv")),
    )
    (tmp_path / "bad.txt").write_bytes(b"fine\nfine\nb\xffd\n")
    refused(r"bad.txt: line 3 is not UTF-8 \(byte 11\)", validated(str(tmp_path / "bad.txt")))
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n\n{"text": \n')
    refused("bad.jsonl: line 3 is not JSON", validated(str(tmp_path / "bad.jsonl")))
    (tmp_path / "null.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    refused(
        "null.jsonl: line 2 has no text in field 'text': it is null; mend or remove it, or set"
        " data.bad_rows=skip",
        validated(str(tmp_path / "null.jsonl")),
    )
    refused(
        r"rows.jsonl: line 1 has no text in field 'body' \(its fields are text\); set data.field",
        validated(rows, field="body"),
    )
    columns = write_rows(tmp_path / "rows.parquet", TEXTS, "content")
    refused("rows.parquet: no field 'text'; set data.field .* of id, content", validated(columns))
    refused(
        "rows.parquet: data.field=id holds int64, not text; set data.field",
        validated(columns, field="id"),
    )
    (tmp_path / "bad.parquet").write_bytes(b"no parquet at all")
    refused("bad.parquet: not a parquet file", validated(str(tmp_path / "bad.parquet")))


def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b \\ud83d\\ude42"}\n')
    path = str(tmp_path / "a.jsonl")
    assert read(text_config(path, validation={"v": path}))["train/text"] == ["a\ufffdb 🙂"]


def test_heavy_libraries_wait_until_they_are_used():
    import subprocess

    code = (
        "import sys, data; print(*{'torch', 'datasets', 'tokenizers', 'pyarrow', 'tqdm',"
        " 'tiktoken'} & set(sys.modules))"
    )
    root = Path(__file__).parents[1]
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()
        == ""
    )


def test_books_have_documents():
    if not BOOKS.exists():
        pytest.skip("no books here")
    path = str(BOOKS / "valid.txt")
    documents = read(text_config(path, separator="<|endoftext|>", validation={"v": path}))[
        "train/text"
    ]
    assert len(documents) == 35
    assert (
        "".join(text + "<|endoftext|>\n" for text in documents)
        == (BOOKS / "valid.txt").read_bytes().decode()
    )


BAD_LINES = {
    '{"text": null}': (
        "has no text in field 'text': it is null; mend or remove it, or set data.bad_rows=skip to"
        " leave such rows out"
    ),
    '"a line"': "is no object with a text in a field; mend",
    "[1]": "is no object with a text in a field; mend",
    '{"id": 3, "body": "x"}': (
        r"has no text in field 'text' \(its fields are id, body\); set data.field to the field that"
        r" holds the text, or set"
    ),
    '{"text": 3}': "has no text in field 'text': it is of another kind; set data.field",
    '{"text": ["a"]}': "has no text in field 'text': it is of another kind; set data.field",
    '{"text": ': "is not JSON in UTF-8; mend",
    '{"text": "caf\udce9"}': "is not JSON in UTF-8; mend",
    f'{{"text": "ok", "m": {"[" * 100_000}{"]" * 100_000}}}': (
        "is nested too deeply to be read; mend"
    ),
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named_or_skipped(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    good = [json.dumps({"text": f"row {index}"}) for index in range(40)]
    path.write_text("\n".join([*good[:20], line, *good[20:]]), errors="surrogateescape")
    config = text_config(str(path), validation={"v": str(path)})
    with pytest.raises(ValueError, match=rf"rows.jsonl: line 21 {BAD_LINES[line]}") as caught:
        read(config)
    assert "\n" not in str(caught.value)
    config.bad_rows = "skip"
    assert read(config)["train/text"] == [f"row {index}" for index in range(40)]
    skipped: list[str] = []
    assert len([*TextCorpus(config).pieces()[0].texts(skipped)]) == 40
    assert len(skipped) == 1 and skipped[0].startswith(f"{path}: line 21 ")


def test_a_number_of_thousands_of_digits_is_no_mistake(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "ok", "id": ' + "9" * 5000 + "}\n")
    assert read(
        text_config(str(tmp_path / "a.jsonl"), validation={"v": str(tmp_path / "a.jsonl")})
    )["train/text"] == ["ok"]


def latin_1(kind: pa.DataType) -> pa.Array:
    """Texts of which the second is not UTF-8, though the type says so."""
    values = pa.array([b"ok", b"caf\xe9", b"end"], pa.binary())
    return (
        pa.Array.from_buffers(pa.string(), 3, values.buffers()).cast(kind)
        if kind == pa.string()
        else values.cast(kind)
    )


@pytest.mark.parametrize("kind", [pa.string(), pa.binary(), pa.large_binary(), pa.binary_view()])
def test_latin_1_in_parquet_is_named_or_skipped(tmp_path, kind):
    path = str(tmp_path / "rows.parquet")
    pq.write_table(pa.table({"text": latin_1(kind)}), path)
    with pytest.raises(
        ValueError,
        match=(
            r"rows.parquet: row 1 is not UTF-8 in field 'text' \(byte 3 of the text\); mend or"
            r" remove it, or set data.bad"
        ),
    ):
        read(text_config(path, validation={"v": path}))
    assert read(text_config(path, validation={"v": path}, bad_rows="skip"))["train/text"] == [
        "ok",
        "end",
    ]


@pytest.mark.parametrize(
    "kind",
    [
        pa.binary(),
        pa.large_binary(),
        pa.string_view(),
        pa.large_string(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
)
def test_any_column_of_text_is_read(tmp_path, kind):
    path = str(tmp_path / "rows.parquet")
    pq.write_table(pa.table({"text": pa.array(["abc", "é", "abc"]).cast(kind)}), path)
    assert read(text_config(path, validation={"v": path}))["train/text"] == ["abc", "é", "abc"]


def test_a_null_in_parquet_is_named_or_skipped(tmp_path):
    path = write_rows(tmp_path / "rows.parquet", [*["a"] * 20, None, "b"])
    with pytest.raises(
        ValueError, match=r"rows.parquet: row 20 has no text in field 'text': it is null; mend"
    ):
        read(text_config(path, validation={"v": path}))
    assert read(text_config(path, validation={"v": path}, bad_rows="skip"))["train/text"] == [
        *["a"] * 20,
        "b",
    ]


def test_text_that_is_not_utf_8_is_skipped_where_it_is_a_document(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"one\n<eos>\ncaf\xe9\n<eos>\ntwo\n")
    config = text_config(
        str(tmp_path / "a.txt"),
        separator="<eos>",
        bad_rows="skip",
        validation={"v": str(tmp_path / "a.txt")},
    )
    assert read(config)["train/text"] == ["one\n", "two\n"]
    (tmp_path / "b.txt").write_text("fine")
    whole = text_config(str(tmp_path), bad_rows="skip", validation={"v": str(tmp_path / "b.txt")})
    assert read(whole)["train/text"] == ["fine"]
    # the other parts of the document are kept, so it is not skipped
    monkeypatch.setattr(pieces, "PIECE_BYTES", 4)
    with pytest.raises(
        ValueError,
        match=r"a.txt: line 3 is not UTF-8 \(byte 13\); convert the file, for example with iconv$",
    ):
        read(whole)


def test_a_byte_order_mark_is_no_text(tmp_path):
    mark = "\ufeff"
    (tmp_path / "b.txt").write_bytes(
        f"{mark}<|endoftext|>\r\nfirst\r\n{mark}<|endoftext|>\r\n{mark}second {mark}\r\n".encode()
    )
    path = str(tmp_path / "b.txt")
    documents = read(text_config(path, separator="<|endoftext|>", validation={"v": path}))[
        "train/text"
    ]
    assert documents == ["first\r\n", f"second {mark}\r\n"]
    assert read(text_config(path, validation={"v": path}))["train/text"][0].startswith(
        "<|endoftext|>"
    )
    for kind in ("jsonl", "parquet"):
        rows = write_rows(tmp_path / f"rows.{kind}", [f"{mark}a", mark, "b"])
        if kind == "jsonl":
            Path(rows).write_bytes(mark.encode() + Path(rows).read_bytes())
        assert read(text_config(rows, validation={"v": rows}))["train/text"] == ["a", "b"]


def test_a_folder_is_all_its_text(tmp_path):
    folder = tmp_path / "texts"
    for name in ("b.txt", "deep/er/a.jsonl", ".hidden/x.txt", ".x.txt", "notes.md", "deep/c.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"text": "row"}' if name.endswith("jsonl") else name)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "d.txt").write_text("linked")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "circle").symlink_to(folder)
    files = TextCorpus(text_config(str(folder), validation={"v": str(folder / "deep")})).sources[
        "text"
    ]
    assert [file.name for file in files] == ["b.txt", "deep/c.txt", "deep/er/a.jsonl", "link/d.txt"]


@pytest.mark.parametrize("name", ["F [v2]", "a*b", "what?", "[!x]", "{a,b}"])
def test_characters_of_globs_in_a_folders_name(tmp_path, name):
    (tmp_path / name / "[1]").mkdir(parents=True)
    for file in ("x.txt", "y.txt", "[1]/z.txt"):
        (tmp_path / name / file).write_text(file)
    for path, found in (
        (f"{name}/*.txt", 2),
        (f"{name}/[1]/*.txt", 1),
        (f"{name}/[xz].txt", 1),
        (f"{name}/**/*.txt", 3),
        (name, 3),
    ):
        assert (
            len(
                TextCorpus(
                    text_config(
                        str(tmp_path / path), validation={"v": str(tmp_path / name / "x.txt")}
                    )
                ).sources["text"]
            )
            == found
        )
    with pytest.raises(
        ValueError, match=r"matches no file; .*; \[ \] in a name are written \[\[\] and \[\]\]"
    ):
        TextCorpus(text_config(str(tmp_path / "no [v3]" / "*.txt")))
    with pytest.raises(ValueError, match=r"matches no file; give a file or a glob like \S+$"):
        TextCorpus(text_config(str(tmp_path / name / "none.txt")))


def test_the_home_folder_may_be_missing(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert TextCorpus(text_config("~/a.txt", validation={"v": "~/*.txt"})).sources["text"][
        0
    ].path == str(tmp_path / "a.txt")
    monkeypatch.setenv("HOME", "")
    for config, key in (
        (text_config("~/a.txt", cache=str(tmp_path)), "data.path"),
        (text_config(str(tmp_path), cache="~/c"), "data.cache"),
    ):
        with pytest.raises(
            ValueError,
            match=f"{key}=~/.*: no home folder is known; set HOME, or give {key} a path without ~",
        ):
            prepare(config, TokenizerConfig())
    with pytest.raises(ValueError, match=r"tokenizer.path=~nobody-here/x: no user has this name"):
        prepare(
            text_config(str(tmp_path), cache=str(tmp_path)),
            TokenizerConfig(name="gpt2", path="~nobody-here/x"),
        )


def test_the_last_row_is_a_tail(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n\n \n')
    documents = read(text_config(str(tmp_path / "a.jsonl"), validation_split="tail"))
    assert documents == {"train/text": ["one"], "validation/validation": ["two"]}


@pytest.mark.parametrize("copy", ["copy", "symlink", "hard link"])
def test_a_validation_file_that_holds_a_training_file_is_named(tmp_path, copy, capsys):
    train, other = tmp_path / "train.txt", tmp_path / "other.txt"
    train.write_text("".join(f"line {index}\n" for index in range(1000)))
    if copy == "copy":
        other.write_bytes(train.read_bytes())
    elif copy == "symlink":
        other.symlink_to(train)
    else:
        other.hardlink_to(train)
    config = text_config(str(train), validation={"v": str(other)}, cache=str(tmp_path / "cache"))
    expected = (
        f"note: {other} of data.validation.v holds the same bytes as {train}, which is trained on\n"
    )
    for _ in range(2):  # every run is told, once
        print_note.cache_clear()
        prepare(config, TokenizerConfig())
        prepare(config, TokenizerConfig())
        assert capsys.readouterr().err.count(expected) == 1


def test_documents_that_are_in_both_are_noticed(tmp_path, capsys):
    generator = random.Random(0)
    texts = [
        " ".join(
            generator.choices(
                ["some", "words", "that", "nobody", "wrote", "in", "this", "order"], k=120
            )
        )
        for _ in range(60)
    ]
    train = write_rows(tmp_path / "train.jsonl", texts)
    shared = write_rows(
        tmp_path / "shared.parquet", [*texts[:5], *[text[::-1] for text in texts[5:20]]]
    )
    new = write_rows(tmp_path / "new.jsonl", [text[::-1] for text in texts[:20]])
    prepare(
        text_config(
            train, validation={"shared": shared, "new": new}, cache=str(tmp_path / "cache")
        ),
        TokenizerConfig(),
    )
    said = capsys.readouterr().err
    assert re.search(
        r"note: about 2\d% of validation/shared is in the training text too, as"
        r" '.*nobody.*wrote.*'",
        said,
    )
    assert "validation/new" not in said


def test_short_documents_that_are_in_both_are_noticed(tmp_path, capsys):
    """Their neighbours are others, so no stretch over several of them is there twice; of rows that
    are there three times most are in both."""
    generator = random.Random(0)
    words = [f"w{index}" for index in range(200)]
    rows = [" ".join(generator.choices(words, k=12)) for _ in range(400)]
    train, thrice = (
        write_rows(tmp_path / "train.jsonl", rows),
        write_rows(tmp_path / "thrice.jsonl", [row for row in rows for _ in range(3)]),
    )
    copied = write_rows(tmp_path / "copied.jsonl", generator.sample(rows, 40))
    new = write_rows(
        tmp_path / "new.jsonl", [" ".join(generator.choices(words, k=12)) for _ in range(40)]
    )
    prepare(
        text_config(
            train, validation={"copied": copied, "new": new}, cache=str(tmp_path / "cache")
        ),
        TokenizerConfig(),
    )
    prepare(text_config(thrice, cache=str(tmp_path / "cache")), TokenizerConfig())
    said = capsys.readouterr().err
    assert "about 100% of validation/copied is" in said and "% of validation/validation is" in said
    assert "validation/new" not in said


@pytest.mark.parametrize("num_words", [36, 42, 60])
@pytest.mark.parametrize("kind", ["reversed.txt", "crlf.txt", "rows.jsonl"])
def test_documents_in_another_order_are_noticed_whole(tmp_path, capsys, num_words, kind):
    """Whatever their length is beside that of the stretches that are compared."""
    words = np.random.default_rng(1).choice([f"w{index:03d}" for index in range(999)], (400, 60))
    documents = [" ".join(line[:num_words]) for line in words]

    def write(name: str, texts: list[str], end: str = "\n") -> str:
        content = f"<eos>{end}".join(text + end for text in texts)
        (tmp_path / name).write_bytes(content.encode())
        return str(tmp_path / name)

    train = write("train.txt", documents[:200])
    if kind == "rows.jsonl":
        copied = write_rows(tmp_path / kind, documents[:200])
    else:
        copied = write(kind, documents[199::-1], "\r\n" if kind == "crlf.txt" else "\n")
    config = text_config(
        train,
        validation={"copied": copied, "new": write("new.txt", documents[200:])},
        separator="<eos>",
        cache=str(tmp_path / "cache"),
    )
    print_note.cache_clear()
    prepare(config, TokenizerConfig())
    said = capsys.readouterr().err
    assert re.search(r"about (100|9\d)% of validation/copied is", said)
    assert "validation/new" not in said


NO_TEXT = {
    "packed.jsonl": (gzip.compress(b'{"text": "a"}\n'), "is gzipped; unpack it"),
    "packed.txt": (b"\x28\xb5\x2f\xfd" + b"x" * 99, "is compressed by zstd; unpack it"),
    "wide.jsonl": ('{"text": "a"}\n'.encode("utf-16"), "is UTF-16; convert it to UTF-8"),
    "wide.txt": ("some text".encode("utf-16-be"), "is no UTF-8: many of its first bytes are 0"),
}


@pytest.mark.parametrize("name", NO_TEXT)
def test_a_file_that_is_no_text_is_called_what_it_is(tmp_path, name):
    """It is no matter of bad rows, for all would be."""
    content, said = NO_TEXT[name]
    (tmp_path / name).write_bytes(content)
    config = text_config(str(tmp_path / name), bad_rows="skip", cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=f"{name} {said}"):
        prepare(config, TokenizerConfig())
    with pytest.raises(ValueError, match=f"{name} {said}"):
        check_data(config, TokenizerConfig(), 8)
    (tmp_path / "few.txt").write_bytes(b"a few \0 are text\n" * 40)
    config.path = str(tmp_path / "few.txt")
    prepare(config, TokenizerConfig())


def test_what_is_no_file_is_called_so(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "was.jsonl")
    for name, said in (
        ("pipe.jsonl", "is a pipe or a device; write its text into a file"),
        ("gone.jsonl", f"is a link to {tmp_path}/was.jsonl, which is not there"),
    ):
        with pytest.raises(ValueError, match=f"data.path=.*{name} {said}"):
            TextCorpus(text_config(str(tmp_path / name)))


def test_what_a_run_would_refuse_a_plan_refuses(tmp_path):
    def refused(match: str, config: DataConfig) -> None:
        with pytest.raises(ValueError, match=match):
            check_data(config, TokenizerConfig(), 64)

    cache = str(tmp_path / "cache")
    rows = write_rows(tmp_path / "rows.jsonl", TEXTS)
    check_data(text_config(rows, cache=cache), TokenizerConfig(), 64)
    refused("matches no file", text_config(str(tmp_path / "none.txt"), cache=cache))
    refused(
        "rows.jsonl: line 1 has no text in field 'body'",
        text_config(rows, field="body", cache=cache),
    )
    (tmp_path / "second.jsonl").write_text('{"text": "good"}\n{"text": null}\n')
    refused(
        "second.jsonl: line 2 has no text in field 'text': it is null",
        text_config([rows, str(tmp_path / "second.jsonl")], cache=cache),
    )
    (tmp_path / "short.txt").write_text("short")
    refused(
        "batch.length=64 needs 65 tokens but the source text has 7 at most",
        text_config(str(tmp_path / "short.txt"), cache=cache),
    )
    # A validation set may be shorter than a sequence, under any name.
    short = {"web": str(tmp_path / "short.txt"), "text": str(tmp_path / "short.txt")}
    check_data(text_config(rows, validation=short, cache=cache), TokenizerConfig(), 64)
    (tmp_path / "empty.txt").touch()
    refused(
        "empty.txt has no text",
        text_config(rows, validation={"v": str(tmp_path / "empty.txt")}, cache=cache),
    )
    refused(
        "data.cache=.* cannot be made .*rows.jsonl is no folder",
        text_config(rows, cache=f"{rows}/cache"),
    )
    (tmp_path / "train.bin").write_bytes(np.arange(3000, dtype="<u4").tobytes())
    refused(
        "train.bin holds uint32",
        DataConfig(source="tokens", path=str(tmp_path / "train.bin"), cache=cache),
    )
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match="matches no file"):
        train.main(compose(["plan_only=true", "data=text", f"data.path={tmp_path}/none.txt"]))


def test_a_damaged_page_of_parquet_is_told_with_its_file(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(
        pa.table({"text": [f"row {number} of some words" for number in range(400)]}),
        path,
        compression="snappy",
    )
    content = bytearray(path.read_bytes())
    content[100:160] = b"\xff" * 60
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"rows\.parquet: row group 0 is damaged \(.*\); get the file again"
    ):
        read(text_config(str(path)))
