import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from data.tokenizer import GPT2_PATTERN, Tokenizer, bytes_tokenizer, head, train_bpe

STDLIB = Path(sysconfig.get_path("stdlib"))
GPT2 = Path(__file__).parents[2] / "shared" / "data" / "gpt2-bpe"
SAMPLES = ["", "a", "Grüße, 日本語 🙂\u3000\r\n\t x  \n\n y", "<|endoftext|>", "'s 're 123  4\n   ", "\x00\x7f\u2028\ufeff"]


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
    assert bpe.decode([bpe.eot]) == "<|endoftext|>" and bpe.encode("<|endoftext|>").tolist() != [bpe.eot]


def test_single_tokens_decode_to_bytes(bpe):
    text = "日本語 🙂 def main(self):"
    ids = bpe.encode(text)
    assert b"".join(bpe.decode_bytes([i]) for i in ids) == text.encode()
    assert [len(bpe.decode_bytes([i])) for i in range(bpe.eot)] == bpe.byte_lengths()[:-1].tolist()
    assert bpe.decode(bpe.encode("é")[:1]) in ("é", "\ufffd")


def test_ids_are_those_of_hugging_face():
    """The same training, and the vocabulary put back into tokenizers' own model: ids must agree on all of these files."""
    texts = stdlib_texts()
    tokenizer = train_bpe(texts, 2048)
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(vocab_size=2047, min_frequency=2, initial_alphabet=alphabet, show_progress=False))
    assert len(texts) > 100
    encoded = model.encode_batch([*texts, *SAMPLES], add_special_tokens=False)
    for text, expected in zip([*texts, *SAMPLES], encoded, strict=True):
        assert tokenizer.encode(text).tolist() == expected.ids


def test_training_twice_gives_the_same_bytes(bpe, tmp_path):
    again = train_bpe(iter(stdlib_texts()[:60]), 1024)
    for name, tokenizer in (("a", bpe), ("b", again)):
        (tmp_path / name).mkdir()
        tokenizer.save(tmp_path / name)
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()
    assert again.hash == bpe.hash != train_bpe(stdlib_texts()[:60], 1023).hash


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match=r"tokenizer.vocab_size=4096 is too large for this text, which gives \d+; choose that or less"):
        train_bpe(["hello hello hello world"], 4096)


def test_head_keeps_to_its_bytes():
    assert list(head(["abc", "déf", "ghi"], 5)) == ["abc", "d"]
    assert list(head(["abc", "def"], 3)) == ["abc"]
    assert list(head(["abc"], 9)) == ["abc"]


def test_saved_and_loaded(bpe, tmp_path):
    bpe.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded == bpe and loaded.hash == bpe.hash
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    for damage in ({"ranks": content["ranks"][:-1]}, {"ranks": ["!"]}, {"special_tokens": {}}, {"ranks": [*content["ranks"][:-1], "YQ=="]}):
        (tmp_path / "tokenizer.json").write_text(json.dumps(content | damage))
        with pytest.raises(ValueError, match=r"tokenizer.json is damaged; delete it"):
            Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer.json is damaged; delete it"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        Tokenizer.load(tmp_path / "none")


def test_the_pattern_is_gpt2s():
    from tiktoken_ext import openai_public

    assert openai_public.r50k_pat_str == GPT2_PATTERN


def test_gpt2_fits_in():
    """GPT-2's own ranks make a Tokenizer with its published ids."""
    if not GPT2.exists():
        pytest.skip("no GPT-2 ranks here")
    import base64

    lines = (line.split() for line in (GPT2 / "gpt2.tiktoken").read_bytes().splitlines())
    tokenizer = Tokenizer("gpt2", GPT2_PATTERN, tuple(base64.b64decode(token) for token, _ in lines))
    assert (tokenizer.vocab_size, tokenizer.eot) == (50257, 50256)
    np.testing.assert_array_equal(tokenizer.encode("Hello world"), [15496, 995])
