import functools
import hashlib
import http.server
import json
import os
import random
import re
import shutil
import sysconfig
import threading
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from tokenizers import models, pre_tokenizers

import data.tokenizer
from data import tokenizer as module
from data.tokenizer import (
    GPT2_HASH,
    GPT2_PATTERN,
    Tokenizer,
    bytes_tokenizer,
    gpt2_tokenizer,
    head,
    train_bpe,
)
from launch.config import compose
from launch.plan.plan import make_plan

STDLIB = Path(sysconfig.get_path("stdlib"))
GPT2 = Path(__file__).parents[2] / "shared" / "data" / "gpt2-bpe"
SAMPLES = [
    "",
    "a",
    "Grüße, 日本語 🙂\u3000\r\n\t x  \n\n y",
    "<|endoftext|>",
    "'s 're 123  4\n   ",
    "\x00\x7f\u2028\ufeff",
]


def stdlib_texts() -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted(STDLIB.glob("*.py"))]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(stdlib_texts()[:60], 1024)


def test_bytes_are_bytes():
    tokenizer = bytes_tokenizer()
    assert (tokenizer.vocab_size, tokenizer.eot) == (257, 256)
    for text in [*SAMPLES, stdlib_texts()[0]]:
        assert tokenizer.encode(text).tolist() == list(text.encode())
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.byte_lengths().tolist() == [1] * 256 + [0]


def test_round_trips(bpe):
    for text in [*SAMPLES, *stdlib_texts()[-20:]]:
        ids = bpe.encode(text)
        assert bpe.decode(ids) == text
        assert bpe.byte_lengths()[ids].sum() == len(text.encode())
        assert len(ids) == 0 or ids.max() < bpe.eot
    assert bpe.vocab_size == 1024 and bpe.eot == 1023
    assert bpe.decode([bpe.eot]) == "<|endoftext|>" and bpe.encode("<|endoftext|>").tolist() != [
        bpe.eot
    ]


def test_single_tokens_decode_to_bytes(bpe):
    text = "日本語 🙂 def main(self):"
    ids = bpe.encode(text)
    assert b"".join(bpe.decode_bytes([i]) for i in ids) == text.encode()
    assert [len(bpe.decode_bytes([i])) for i in range(bpe.eot)] == bpe.byte_lengths()[:-1].tolist()
    assert bpe.decode(bpe.encode("é")[:1]) in ("é", "\ufffd")


def test_ids_are_those_of_hugging_face():
    """The same training, and the vocabulary put back into tokenizers' own model: ids must agree on
    all of these files."""
    texts = stdlib_texts()
    tokenizer = train_bpe(texts, 2048)
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        texts,
        tokenizers.trainers.BpeTrainer(
            vocab_size=2047, min_frequency=2, initial_alphabet=alphabet, show_progress=False
        ),
    )
    assert len(texts) > 100
    encoded = model.encode_batch([*texts, *SAMPLES], add_special_tokens=False)
    for text, expected in zip([*texts, *SAMPLES], encoded, strict=True):
        assert tokenizer.encode(text).tolist() == expected.ids


def test_training_twice_gives_the_same_bytes(bpe, tmp_path):
    again = train_bpe(iter(stdlib_texts()[:60]), 1024)
    for name, tokenizer in (("a", bpe), ("b", again)):
        (tmp_path / name).mkdir()
        tokenizer.save(tmp_path / name)
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (
        tmp_path / "b/tokenizer.json"
    ).read_bytes()
    assert again.hash == bpe.hash != train_bpe(stdlib_texts()[:60], 1023).hash


def test_too_little_text_is_refused():
    with pytest.raises(
        ValueError,
        match=(
            r"tokenizer.vocab_size=4096 is too large for this text, which gives \d+; choose that or"
            r" less"
        ),
    ):
        train_bpe(["hello hello hello world"], 4096)


@pytest.mark.parametrize("texts", [[], [""], ["abc"]])
def test_text_without_repetition_has_a_remedy_that_can_be_taken(texts):
    with pytest.raises(ValueError, match=r"no two bytes of it come together twice; give more text"):
        train_bpe(texts, 258)


def test_head_keeps_to_its_bytes():
    assert list(head(["abc", "déf", "ghi"], 5)) == ["abc", "d"]
    assert list(head(["abc", "def"], 3)) == ["abc"]
    assert list(head(["abc"], 9)) == ["abc"]


def test_saved_and_loaded(bpe, tmp_path):
    bpe.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded == bpe and loaded.hash == bpe.hash
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    for damage in (
        {"ranks": content["ranks"][:-1]},
        {"ranks": ["!"]},
        {"special_tokens": {}},
        {"ranks": [*content["ranks"][:-1], "YQ=="]},
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps(content | damage))
        with pytest.raises(
            ValueError, match=r"tokenizer.json is damaged.*; delete it, it is rebuilt"
        ):
            Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer.json is damaged.*; delete it, it is rebuilt"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        Tokenizer.load(tmp_path / "none")


def test_the_pattern_is_gpt2s():
    from tiktoken_ext import openai_public

    assert openai_public.r50k_pat_str == GPT2_PATTERN


@pytest.fixture
def ranks(tmp_path) -> Path:
    """A folder with gpt2.tiktoken, encoder.json and vocab.bpe, that a test may change."""
    if not GPT2.exists():
        pytest.skip("no GPT-2 ranks here")
    shutil.copytree(GPT2, tmp_path / "ranks", copy_function=shutil.copyfile)
    (tmp_path / "ranks").chmod(0o755)
    return tmp_path / "ranks"


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setattr(data.tokenizer, "GPT2_URL", "http://127.0.0.1:9/vocab.bpe")


def tiktokens_cache(ranks: Path, folder: Path) -> Path:
    folder.mkdir()
    for name in ("vocab.bpe", "encoder.json"):
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        shutil.copyfile(ranks / name, folder / hashlib.sha1(url.encode()).hexdigest())
    return folder


def test_gpt2_is_tiktokens(ranks, tmp_path, monkeypatch, no_network):
    """The ids of all of these files, from each place and form that the ranks may have."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tiktokens_cache(ranks, tmp_path / "cache")))
    tiktoken.registry.ENCODINGS.pop("gpt2", None)
    theirs, ours = tiktoken.get_encoding("gpt2"), gpt2_tokenizer(None, tmp_path / "nowhere")
    assert (ours.vocab_size, ours.eot) == (theirs.n_vocab, theirs.eot_token) == (50257, 50256)
    texts = [*stdlib_texts(), *SAMPLES]
    assert [ours.encode(text).tolist() for text in texts] == theirs.encode_ordinary_batch(texts)
    assert ours.decode([15496, 995, 50256]) == "Hello world<|endoftext|>" and ours.hash == GPT2_HASH
    (ranks / "vocab.bpe").rename(ranks / "merges.txt")  # its name on the hub of Hugging Face
    for path in ("gpt2.tiktoken", "merges.txt", "."):
        assert gpt2_tokenizer(str(ranks / path), tmp_path / "nowhere") == ours
    (tmp_path / "ours").mkdir()
    shutil.move(ranks, tmp_path / "ours" / "gpt2")
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    assert gpt2_tokenizer(None, tmp_path / "ours") == ours
    assert make_plan(compose(["model=tiny", "tokenizer=gpt2"])).model.vocab_size == ours.vocab_size


def test_gpt2s_ranks_are_fetched_once(ranks, tmp_path, monkeypatch):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=ranks)
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
        monkeypatch.setattr(
            data.tokenizer, "GPT2_URL", f"http://127.0.0.1:{server.server_port}/vocab.bpe"
        )
        fetched = gpt2_tokenizer(None, tmp_path / "cache")
        server.shutdown()
    assert gpt2_tokenizer(None, tmp_path / "cache") == fetched
    assert [path.name for path in (tmp_path / "cache" / "gpt2").iterdir()] == ["vocab.bpe"]


def test_ranks_that_are_missing_or_others_are_named(ranks, tmp_path, no_network):
    with pytest.raises(
        ValueError,
        match=(
            rf"tokenizer=gpt2: its ranks are not in {tmp_path}/gpt2 and cannot be fetched .*; put"
            r" vocab.bpe or .*"
        ),
    ):
        gpt2_tokenizer(None, tmp_path)
    (tmp_path / "empty").mkdir()
    for path in ("none", "empty"):
        with pytest.raises(
            ValueError,
            match=(
                rf"tokenizer.path=.*{path} holds no ranks of GPT-2; name a gpt2.tiktoken or"
                r" vocab.bpe"
            ),
        ):
            gpt2_tokenizer(str(tmp_path / path), tmp_path)
    lines = (ranks / "gpt2.tiktoken").read_bytes().splitlines(keepends=True)
    damages = {
        "cut off": lines[:40000],
        "swapped": [*lines[:-2], lines[-1], lines[-2]],
        "is no file of GPT-2's ranks": [b"!\n"],
        "no file": [b"\xff"],
    }
    for name, content in damages.items():
        (ranks / "gpt2.tiktoken").write_bytes(b"".join(content))
        with pytest.raises(
            ValueError,
            match=name if "no file" in name else "gpt2.tiktoken does not hold GPT-2's 50256 ranks",
        ):
            gpt2_tokenizer(str(ranks), tmp_path)
    with pytest.raises(
        ValueError,
        match=r"encoder.json is no file of GPT-2's ranks; give gpt2.tiktoken or vocab.bpe",
    ):
        gpt2_tokenizer(str(ranks / "encoder.json"), tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        "[1]",
        "3",
        '"ranks"',
        '{"huggingface": 3}',
        "[" * 200_000,
        '{"name": "x", "pattern": "(", "ranks": []}',
    ],
)
def test_a_tokenizer_that_is_something_else_is_named(tmp_path, damage):
    (tmp_path / "tokenizer.json").write_text(damage)
    with pytest.raises(
        ValueError, match=r"tokenizer.json is damaged.*; delete it, it is rebuilt"
    ) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"tokenizer.json is no regular file"):
        Tokenizer.load(tmp_path)


def test_around_long_white_space_ids_are_those_of_the_whole_text(bpe, monkeypatch):
    """Runs of three are long here, so that the library can tell the ids of the whole."""
    space = module.WHITE_SPACE
    monkeypatch.setattr(module, "LONG_SPACE", re.compile(f"(?<![{space}])[{space}]{{3,}}"))
    generator = random.Random(0)
    kinds = [" ", "\n", "\t", "\r\n", "\u3000", "\x85", "\xa0", "\u2028", "\x1c"] * 3 + [
        "a",
        "é",
        "12",
        "!",
        "'s",
        "日本",
        "_",
    ]
    for _ in range(1000):
        text = "".join(generator.choices(kinds, k=generator.randint(1, 40)))
        assert bpe._encode_long_spaces(text).tolist() == bpe.encode(text).tolist(), text


@pytest.mark.parametrize(
    "text",
    ["s" + " " * 1_000_010 + "e", "\n" * 1_200_000, " " * 1_000_100 + "a" + "\t" * 1_000_100],
)
def test_a_million_white_space_characters_are_encoded(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text


@pytest.mark.parametrize(
    "word", [" " * 400_000, "\n \t" * 100_000, "a1" * 200_000, "-_" * 200_000, "ก" * 300_000]
)
def test_training_is_quick_on_words_without_end(word):
    """Beside it, one word of a tenth of that length took minutes."""
    bpe = train_bpe(["word and word " * 50, f"x{word}y"], 262)
    assert max(map(len, bpe.ranks)) <= 4 * module.LONGEST_WORD
    parts = [*module.part_long_words(f"some x{word}y words")]
    assert (
        "".join(parts) == f"some x{word}y words" and max(map(len, parts)) < module.LONGEST_WORD + 10
    )


def test_words_of_languages_are_not_parted():
    texts = [
        "one two\n" * 1000,
        "{};=" * 60 + "a" * 250,
        "日本語。" * 1000,
        "-" * 256 + "\n" + " " * 255 + "x",
    ]
    assert [[*module.part_long_words(text)] for text in texts] == [[text] for text in texts]
