"""Shards that exist already: nanoGPT's raw files and our own, read where they lie."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from conf.text import DataConfig, SourceConfig, TokenizerConfig
from data import cache_folders, prepare, raw_tokens
from data.overlap import print_note
from data.shards import HEADER, Shard
from data.tokenizer import bytes_tokenizer, train_bpe
from launch.config import compose
from launch.run.identity import canonical
from tests.test_corpora import TEXTS, text_config, write_rows
from tests.test_shards import BYTES, change, contents, numbered, rot

EOT = 256


def raw(path: Path, *texts: str) -> np.ndarray:
    """Writes texts as nanoGPT's prepare.py does, in our bytes; returns the ids."""
    ids = np.concatenate([np.append(bytes_tokenizer().encode(text), EOT) for text in texts]).astype(
        np.uint16
    )
    ids.tofile(path)
    return ids


def tokens_config(path, cache, **settings) -> DataConfig:
    return DataConfig(
        name="tokens",
        source="tokens",
        path=path if isinstance(path, list | None) else str(path),
        cache=str(cache),
        **settings,
    )


@pytest.fixture
def nanogpt(tmp_path) -> Path:
    """A folder of train.bin and val.bin."""
    folder = tmp_path / "openwebtext"
    folder.mkdir()
    raw(folder / "train.bin", *TEXTS)
    raw(folder / "val.bin", *TEXTS[:3])
    return folder


def test_nanogpts_folder(nanogpt, tmp_path, capsys):
    corpus = prepare(tokens_config(nanogpt, tmp_path / "cache"), BYTES)
    train, validation = corpus.train["tokens"], corpus.validation["validation"]
    for part, name in ((train, "train"), (validation, "val")):
        ids = np.fromfile(nanogpt / f"{name}.bin", np.uint16)
        assert part.read(0, len(part)).tolist() == ids.tolist()
        assert part.num_documents == (ids == EOT).sum() and part.num_bytes == (ids != EOT).sum()
    assert (
        isinstance(train.shards[0].tokens, np.memmap)
        and train.shards[0].path == nanogpt / "train.bin"
    )
    assert sorted(path.name for path in nanogpt.iterdir()) == ["train.bin", "val.bin"]
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*")) < 20_000
    assert (
        corpus.weights is None and corpus.meta["parts"]["validation/validation"]["documents"] == 3
    )
    assert (
        "train.bin holds" in (said := capsys.readouterr().err) and "begins 'document 0: na" in said
    )


def test_files_sets_and_weights(nanogpt, tmp_path):
    train, val = str(nanogpt / "train.bin"), str(nanogpt / "val.bin")
    corpus = prepare(
        tokens_config([val, train], tmp_path, validation={"x": val, "y": [train]}), BYTES
    )
    ids = np.concatenate([np.fromfile(path, np.uint16) for path in (val, train)])
    assert corpus.train["tokens"].read(0, 10**6).tolist() == ids.tolist()
    assert {name: len(part) for name, part in corpus.validation.items()} == {
        "x": os.path.getsize(val) // 2,
        "y": os.path.getsize(train) // 2,
    }
    sources = {"a": SourceConfig(train, 3.0), "b": SourceConfig(val)}
    corpus = prepare(tokens_config(None, tmp_path, sources=sources), BYTES)
    assert corpus.weights == {"a": 3.0, "b": 1.0} and set(corpus.train) == set(
        corpus.validation
    ) == {"a", "b"}
    assert set(
        prepare(tokens_config(nanogpt, tmp_path, validation={"y": val}), BYTES).validation
    ) == {"y"}


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.5])
def test_the_tail_is_held_out(tmp_path, monkeypatch, fraction):
    monkeypatch.setattr(raw_tokens, "BLOCK", 100)
    stream = np.concatenate(
        [raw(tmp_path / f"{index}.bin", *TEXTS[20 * index : 20 * index + 20]) for index in range(3)]
    )
    corpus = prepare(
        tokens_config(f"{tmp_path}/*.bin", tmp_path / "cache", validation_fraction=fraction), BYTES
    )
    train, tail = corpus.train["tokens"], corpus.validation["validation"]
    point = int(len(stream) * (1 - fraction))
    assert (train.read(0, 10**6).tolist(), tail.read(0, 10**6).tolist()) == (
        stream[:point].tolist(),
        stream[point:].tolist(),
    )
    for part, ids in ((train, stream[:point]), (tail, stream[point:])):
        assert (part.num_documents, part.num_bytes) == ((ids == EOT).sum(), (ids != EOT).sum())


def test_a_file_is_read_through_once(nanogpt, tmp_path, monkeypatch):
    (nanogpt / "val.bin").unlink()
    first = prepare(tokens_config(nanogpt, tmp_path), BYTES)
    with monkeypatch.context() as patched:
        patched.setattr(raw_tokens, "count_ids", None)
        assert prepare(tokens_config(nanogpt, tmp_path), BYTES).fingerprint == first.fingerprint
    change(nanogpt / "train.bin", 100, (300).to_bytes(2, "little"))
    with pytest.raises(
        ValueError,
        match=(
            r"train.bin holds token 300, beyond the vocabulary of 257 of tokenizer=bytes; name the"
            r" tokenizer"
        ),
    ):
        prepare(tokens_config(nanogpt, tmp_path), BYTES)
    change(nanogpt / "train.bin", 100, b"\1\0")
    assert prepare(tokens_config(nanogpt, tmp_path), BYTES).fingerprint != first.fingerprint


def test_the_fingerprint_is_of_the_tokens_wherever_they_lie(nanogpt, tmp_path):
    first = prepare(tokens_config(nanogpt, tmp_path / "cache"), BYTES).fingerprint
    (tmp_path / "copy").mkdir()
    for name in ("train.bin", "val.bin"):
        (tmp_path / "copy" / name).write_bytes((nanogpt / name).read_bytes())  # of another time
    assert prepare(tokens_config(tmp_path / "copy", tmp_path / "other"), BYTES).fingerprint == first
    (nanogpt / "val.bin").unlink()
    tails = [
        prepare(
            tokens_config(nanogpt, tmp_path / "cache", validation_fraction=fraction), BYTES
        ).fingerprint
        for fraction in (0.1, 0.2)
    ]
    assert len({first, *tails}) == 3


def test_llmcs_header_is_no_text(tmp_path):
    path = tmp_path / "fineweb.bin"
    ids = raw(path, *TEXTS)
    path.write_bytes(np.array([20240520, 1, len(ids), *[0] * 253], "<i4").tobytes() + ids.tobytes())
    corpus = prepare(tokens_config(path, tmp_path / "cache", validation={"v": str(path)}), BYTES)
    assert corpus.train["tokens"].read(0, 10**6).tolist() == ids.tolist()
    with path.open("ab") as file:
        file.write(b"\0\0")
    with pytest.raises(ValueError, match="which no file of uint16 has"):
        prepare(tokens_config(path, tmp_path / "cache", validation={"v": str(path)}), BYTES)


@pytest.fixture
def prepared(tmp_path):
    """A corpus of text, in our own shards of a trained tokenizer."""
    path = write_rows(tmp_path / "rows.jsonl", TEXTS)
    return prepare(
        text_config(path, cache=str(tmp_path / "cache"), validation_fraction=0.3),
        TokenizerConfig(name="bpe", vocab_size=280),
    )


BPE = TokenizerConfig(name="bpe", vocab_size=280)


def test_a_prepared_corpus(prepared, tmp_path, monkeypatch):
    before = contents(prepared.folder)
    corpus = prepare(tokens_config(prepared.folder, tmp_path / "other"), BPE)
    assert corpus.tokenizer == prepared.tokenizer
    for ours, theirs in (
        (corpus.train["text"], prepared.train["text"]),
        (corpus.validation["validation"], prepared.validation["validation"]),
    ):
        assert (
            ours.read(0, 10**6).tolist() == theirs.read(0, 10**6).tolist()
            and ours.num_documents == theirs.num_documents
        )
    assert contents(prepared.folder) == before
    by_hand = tokens_config(
        f"{prepared.folder}/train/*/*.bin",
        tmp_path / "other",
        validation={"v": f"{prepared.folder}/validation/*/*.bin"},
    )
    assert len(prepare(by_hand, BPE).train["tokens"]) == len(corpus.train["text"])
    by_hand.validation = {}
    assert len(prepare(by_hand, prepared.tokenizer).validation["validation"]) > 1
    monkeypatch.setattr(Shard, "verify", None)  # done, and remembered
    assert (
        prepare(tokens_config(prepared.folder, tmp_path / "other"), BPE).fingerprint
        == corpus.fingerprint
    )


def test_damage_of_our_own_shards_is_not_mended_by_deletion(prepared, tmp_path):
    config = tokens_config(prepared.folder, tmp_path / "other")
    path = prepared.folder / "train/text/00000.bin"
    remedy = "name the tokenizer that it was made with, or get the file again$"
    with pytest.raises(
        ValueError, match=rf"{path} was written with another tokenizer \(.*\); {remedy}"
    ):
        prepare(config, BYTES)
    with pytest.raises(
        ValueError, match=r"tokenizer.vocab_size=4096 but .*tokenizer.json has 280; set that"
    ):
        prepare(config, TokenizerConfig(name="bpe"))
    change(path, HEADER.size + 10, b"\xff")
    with pytest.raises(
        ValueError, match=rf"{path} does not have its checksum: it is corrupt; {remedy}"
    ):
        prepare(config, BPE)
    path.unlink()
    with pytest.raises(ValueError, match=f"{path}: No such file or directory"):
        prepare(config, BPE)
    for damage in (
        "{",
        "[]",
        '{"fingerprint": "a", "parts": {"other/text": {}}}',
        '{"fingerprint": "a", "parts": {"train/text": {"shards": -1}}}',
    ):
        (prepared.folder / "meta.json").write_text(damage)
        with pytest.raises(ValueError, match=r"meta.json cannot be read"):
            prepare(config, BPE)


def test_mistakes_are_named_in_one_line(nanogpt, tmp_path):
    def refused(match: str, path, tokenizer=BYTES, **settings) -> None:
        with pytest.raises(ValueError, match=match) as caught:
            prepare(tokens_config(path, tmp_path / "cache", **settings), tokenizer)
        assert "\n" not in str(caught.value)

    train = nanogpt / "train.bin"
    refused("data.path=None with 0 data.sources", None)
    refused("data.validation=v.bin has no names", train, validation="v.bin")
    refused(
        r"data.path=.*none.bin matches no file; give a file or a glob like FOLDER/\*.bin",
        tmp_path / "none.bin",
    )
    (tmp_path / "empty").mkdir()
    refused("empty holds no .bin file", tmp_path / "empty")
    (tmp_path / "a.txt").touch()
    refused("a.txt is of no known kind; give .bin files", tmp_path / "a.txt")
    refused(
        "raw uint16 is too narrow for a vocabulary of 65537; name the tokenizer",
        train,
        numbered(2**16 + 1),
    )
    refused("tokenizer=bpe: there is no tokenizer.json by .*train.bin", train, BPE)
    refused(
        "holds token 256, beyond the vocabulary of 100 of tokenizer=numbered", train, numbered(100)
    )
    for content in (b"", b"odd"):
        (tmp_path / "odd.bin").write_bytes(content)
        refused(
            f"odd.bin has {len(content)} bytes, which no file of uint16 has", tmp_path / "odd.bin"
        )
    (tmp_path / "one.bin").write_bytes(b"\0\0")
    refused("train/tokens has fewer than two tokens", tmp_path / "one.bin")
    (nanogpt / "meta.pkl").touch()
    refused(
        "train.bin has a meta.pkl beside it: its ids are nanoGPT's characters.*; prepare its text"
        " with data=text",
        nanogpt,
    )


def test_a_cache_that_cannot_be_written_is_read(nanogpt, tmp_path, monkeypatch):
    def refuse(path, content):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(cache_folders, "write_atomically", refuse)
    assert len(prepare(tokens_config(nanogpt, tmp_path / "cache"), BYTES).train["tokens"])


def test_a_cache_that_has_no_room_for_records_is_enough(nanogpt, tmp_path):
    first = prepare(tokens_config(nanogpt, tmp_path / "cache"), BYTES)
    folder = first.folder
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    folder.touch()  # so the folder cannot be made, whoever asks
    for path in (nanogpt, [str(nanogpt / "train.bin")]):
        assert prepare(tokens_config(path, tmp_path / "cache"), BYTES).tokenizer == first.tokenizer


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "[]",
        '{"offset": 0}',
        '{"offset": "a", "header": {}, "sha256": "", "looked": 0}',
        "[" * 200_000,
    ],
)
def test_a_record_that_is_damaged_is_made_again(nanogpt, tmp_path, damage):
    first = prepare(tokens_config(nanogpt, tmp_path), BYTES)
    records = [*first.folder.glob("*.json")]
    assert len(records) >= 3
    for record in records:
        record.write_text(damage)
    assert prepare(tokens_config(nanogpt, tmp_path), BYTES).fingerprint == first.fingerprint


def test_bits_that_a_raw_file_lost_are_noticed_in_time(nanogpt, tmp_path):
    config = tokens_config(nanogpt, tmp_path / "cache")
    first = prepare(config, BYTES)
    rot(nanogpt / "val.bin", 10)
    prepare(config, BYTES)  # a moment after the last look
    config.verify_days = 0
    with pytest.raises(
        ValueError,
        match=(
            r"val.bin holds other tokens than before, though its size and time are the same: it is"
            r" corrupt; get it"
        ),
    ):
        prepare(config, BYTES)
    rot(nanogpt / "val.bin", 10)
    assert prepare(config, BYTES).fingerprint == first.fingerprint


@pytest.mark.parametrize(
    ("dtype", "named"), [("<u4", "uint32"), ("<i4", "uint32"), ("<i8", "uint64"), ("<u8", "uint64")]
)
@pytest.mark.parametrize("tokenizer", ["bytes", "own"])
def test_ids_of_another_width_are_refused(tmp_path, dtype, named, tokenizer):
    (np.arange(3000) % 200).astype(dtype).tofile(tmp_path / "wide.bin")
    with pytest.raises(
        ValueError,
        match=(
            rf"wide.bin holds {named}, not uint16: every second id would be 0; write it again with"
            r" numpy"
        ),
    ):
        prepare(
            tokens_config(tmp_path / "wide.bin", tmp_path / "cache"),
            BYTES if tokenizer == "bytes" else numbered(50257),
        )


def test_files_that_are_something_else_are_called_so(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(200, dtype=np.uint16))
    (tmp_path / "a.npy").rename(tmp_path / "npy.bin")
    (tmp_path / "zip.bin").write_bytes(b"PK\3\4" + b"\0" * 1000)
    for name, kind in (("npy", "a .npy file"), ("zip", "a zip file, as torch.save writes")):
        with pytest.raises(ValueError, match=rf"{name}.bin is {kind}, not a file of uint16"):
            prepare(tokens_config(tmp_path / f"{name}.bin", tmp_path / "cache"), numbered(60000))


NO_IDS = {
    "zeros": (bytes(4000), "holds nothing but zeros; get it again"),
    "big": (np.arange(1, 200, dtype=">u4").tobytes(), "holds wider numbers .* highest byte first"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(96), "is compressed by zstd, not a file of uint16"),
}


@pytest.mark.parametrize("kind", NO_IDS)
def test_numbers_that_are_no_ids_are_refused(tmp_path, kind):
    content, said = NO_IDS[kind]
    (tmp_path / "train.bin").write_bytes(content)
    config = DataConfig(source="tokens", path=str(tmp_path / "train.bin"), cache=str(tmp_path))
    with pytest.raises(ValueError, match=f"train.bin {said}"):
        prepare(config, bytes_tokenizer())


def test_a_folder_of_shards_is_all_of_them(tmp_path):
    (tmp_path / "shards" / "deep").mkdir(parents=True)
    ids = np.concatenate(
        [raw(tmp_path / "shards" / name, *TEXTS[:20]) for name in ("a.bin", "b.bin", "deep/c.bin")]
    )
    corpus = prepare(
        tokens_config(
            tmp_path / "shards",
            tmp_path / "cache",
            validation={"v": str(tmp_path / "shards" / "deep")},
        ),
        BYTES,
    )
    assert corpus.train["tokens"].read(0, 10**6).tolist() == ids.tolist()


@pytest.mark.parametrize("kind", ["copy", "link", "part"])
def test_tokens_that_are_trained_and_validated_on_are_noticed(tmp_path, capsys, kind):
    words = np.random.default_rng(0).integers(97, 123, 40_000).astype(np.uint16)
    words.tofile(tmp_path / "train.bin")
    if kind == "link":
        (tmp_path / "val.bin").symlink_to(tmp_path / "train.bin")
    else:
        (
            words if kind == "copy" else np.concatenate([words[1111:3111], words[::-1][:2000]])
        ).tofile(tmp_path / "val.bin")
    for _ in range(2):
        print_note.cache_clear()
        prepare(tokens_config(tmp_path, tmp_path / "cache"), BYTES)
        said = capsys.readouterr().err
        if kind == "part":
            assert "% of validation/validation is in the training text too, as " in said
        else:
            named = (
                f"{tmp_path}/val.bin, which is validated on, holds the same tokens as"
                f" {tmp_path}/train.bin, which is trained on"
            )
            assert said.count(named) == 1


def test_what_a_run_of_tokens_reads(nanogpt):
    config = compose(
        [
            "data=tokens",
            f"data.path={nanogpt}",
            "tokenizer=gpt2",
            "tokenizer.path=x",
            "data.separator=x",
        ]
    )
    read = {key for key in canonical(config) if key.startswith(("data.", "tokenizer."))}
    assert read == {
        "data.name",
        "data.source",
        "data.path",
        "data.sources",
        "data.validation",
        "data.validation_fraction",
        "tokenizer.name",
    }
    with pytest.raises(ValueError, match="data=tokens needs one of the two"):
        compose(["data=tokens"])
    assert json.dumps(canonical(config))


def test_a_trained_tokenizer_lies_beside_raw_shards(tmp_path):
    tokenizer = train_bpe(TEXTS, 280)
    tokenizer.save(tmp_path)
    ids = np.concatenate(
        [np.append(tokenizer.encode(text), tokenizer.eot) for text in TEXTS]
    ).astype(np.uint16)
    ids.tofile(tmp_path / "train.bin")
    corpus = prepare(tokens_config(tmp_path, tmp_path / "cache"), BPE)
    assert corpus.tokenizer == tokenizer
    assert corpus.train["tokens"].num_bytes + corpus.validation["validation"].num_bytes == sum(
        len(text.encode()) for text in TEXTS
    )
