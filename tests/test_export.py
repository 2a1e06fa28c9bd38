"""A run as a Hugging Face folder: the same token ids from AutoTokenizer, ours and theirs, and
nothing else is overwritten."""

import base64
import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("transformers")
import tokenizers
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Tokenizer

from data.hf_export import to_files, to_tokenizers
from data.hf_folder import read_tokenizer
from data.hf_tokenizer import HFTokenizer
from data.tokenizer import GPT2_PATTERN, RankedTokenizer, byte_alphabet, bytes_tokenizer, train_bpe
from model import GPT, GPTConfig
from model.export import to_hf
from model.hf import from_hf
from model.trained import open_trained
from tests.hf_folders import FOLDERS, SAMPLES, SPECIAL, edit, stdlib_texts
from tests.test_hf import our_model

GPT2_RANKS = Path(__file__).parents[2] / "shared" / "data" / "gpt2-bpe" / "gpt2.tiktoken"
PUTS_AN_A_IN_FRONT = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "a", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"a": {"id": "a", "ids": [64], "tokens": ["a"]}},
}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return stdlib_texts()


@pytest.fixture(scope="module")
def bpe(texts) -> RankedTokenizer:
    return train_bpe(texts[:40], 1024)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in FOLDERS.items()}


@pytest.fixture(params=FOLDERS)
def folder(request, folders, tmp_path) -> Path:
    """A folder of each kind, that a test may change."""
    for path in folders[request.param].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_a_plain_export_holds_any_model(bpe, tmp_path):
    """Shapes that transformers does not have: it loads as what export says, with the same weights,
    and the tokenizer as ever."""
    config = GPTConfig(
        bpe.vocab_size,
        64,
        2,
        2,
        16,
        qk_norm=True,
        logit_softcap=20.0,
        tied=False,
        norm="rmsnorm",
        positions="rope",
    )
    model, out = GPT(config), tmp_path / "out"
    model.init_weights(1)
    # the second in the place of the first
    assert to_hf(model, bpe, out, "plain") == to_hf(model, bpe, out, "plain") == "plain"
    again = GPT(GPTConfig(**json.loads((out / "gpt.json").read_text())))
    again.load_state_dict(load_file(out / "model.safetensors"))
    assert again.config == config and all(
        torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True)
    )
    assert AutoTokenizer.from_pretrained(out)("def f():")["input_ids"] == list(
        bpe.encode("def f():")
    )


def test_exported_folder_gives_the_same_ids(folder, texts, tmp_path):
    edit(folder / "tokenizer_config.json", chat_template="{{ messages }}", model_max_length=77)
    ours, theirs = read_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    to_hf(GPT(GPTConfig(ours.vocab_size, 64, 1, 1, 4)), ours, tmp_path / "out")
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in [*SAMPLES, *SPECIAL, *texts[::9]]:
        assert again(text)["input_ids"] == theirs(text)["input_ids"]
        assert again.decode(theirs(text)["input_ids"]) == theirs.decode(theirs(text)["input_ids"])
    assert (
        again.eos_token_id,
        again.bos_token_id,
        again.model_max_length,
        again.chat_template,
    ) == (theirs.eos_token_id, theirs.bos_token_id, 77, "{{ messages }}")
    assert read_tokenizer(tmp_path / "out").hash == ours.hash
    special = json.loads((tmp_path / "out/config.json").read_text())
    assert (special["bos_token_id"], special["eos_token_id"]) == (
        theirs.bos_token_id,
        theirs.eos_token_id,
    )


def test_folder_of_a_tokenizer_alone_is_exported_whole(folders, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folders["llama2"] / "tokenizer.json").read_bytes())
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    settings = to_files(read_tokenizer(tmp_path), 64)["tokenizer_config.json"]
    assert settings == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "model_max_length": 64,
    }


def gpt2() -> RankedTokenizer:
    if not GPT2_RANKS.exists():
        pytest.skip("no GPT-2 ranks here")
    return RankedTokenizer(
        "gpt2",
        GPT2_PATTERN,
        tuple(base64.b64decode(line.split()[0]) for line in GPT2_RANKS.read_bytes().splitlines()),
    )


@pytest.mark.parametrize("name", ["bytes", "bpe", "gpt2"])
def test_token_ids_are_ours(name, bpe, texts, tmp_path):
    ours = {"bytes": bytes_tokenizer, "bpe": lambda: bpe, "gpt2": gpt2}[name]()
    to_hf(GPT(GPTConfig(ours.vocab_size, 64, 1, 1, 4)), ours, tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in [*SAMPLES, *texts[::3]]:
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text).tolist()
        assert theirs.decode(ids) == text
    assert (len(theirs), theirs.eos_token_id, theirs.bos_token_id, theirs.model_max_length) == (
        ours.vocab_size,
        ours.eot,
        ours.eot,
        64,
    )
    assert (
        theirs.decode([ours.eot]) == "<|endoftext|>"
        and theirs.decode([ours.eot], skip_special_tokens=True) == ""
    )
    back = read_tokenizer(tmp_path / "out")
    assert isinstance(back, RankedTokenizer) and back.hash == ours.hash and back.ranks == ours.ranks
    theirs.save_pretrained(tmp_path / "again")
    assert read_tokenizer(tmp_path / "again").hash == ours.hash


def test_word_that_no_merge_reaches_is_its_token():
    """tiktoken looks a whole word up before it merges."""
    ours = RankedTokenizer("odd", GPT2_PATTERN, (*bytes_tokenizer().ranks, b"xyz"))
    assert (
        to_tokenizers(ours).encode("xyz xyz").ids
        == ours.encode("xyz xyz").tolist()
        == [256, 32, *b"xyz"]
    )


def test_text_is_split_alike_at_every_character():
    """tiktoken and tokenizers each have a table of what is a letter, a number and white space."""
    starts = [bytes([value]) for value in (*range(128), *range(0xC2, 0xF5))]
    # merged where no split lies between them
    pairs = dict.fromkeys(kind + start for kind in (b"a", b"1", b"!") for start in starts)
    ours = RankedTokenizer(
        "pairs", GPT2_PATTERN, (*(bytes([value]) for value in range(256)), *pairs)
    )
    theirs = to_tokenizers(ours)
    text = "\n".join(
        f"a{c}1{c}!{c} {c}a" for c in map(chr, (*range(32, 0xD800), *range(0xE000, 0x20000)))
    )
    assert theirs.encode(text).ids == ours.encode(text).tolist()


def test_their_own_gpt2_tokenizer_is_read(texts, tmp_path):
    """tokenizer.json as transformers writes it for GPT-2, with one merge a token."""
    ranks, spelling = (
        gpt2().ranks,
        {value: character for character, value in byte_alphabet().items()},
    )
    vocab = {"".join(spelling[value] for value in token): rank for rank, token in enumerate(ranks)}
    merges = (GPT2_RANKS.parent / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    pairs = [tuple(line.split()) for line in merges if line]
    GPT2Tokenizer(vocab={**vocab, "<|endoftext|>": 50256}, merges=pairs).save_pretrained(tmp_path)
    ours, theirs = read_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.hash == gpt2().hash
    assert theirs(texts[3])["input_ids"] == ours.encode(texts[3]).tolist()


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["model"].update(byte_fallback=True),
        lambda content: content.update(normalizer={"type": "NFC"}),
        lambda content: content.update(pre_tokenizer={"type": "Whitespace"}),
        lambda content: content.update(pre_tokenizer=None),
        lambda content: content.update(
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Digits", "individual_digits": True},
                    content["pre_tokenizer"],
                ],
            }
        ),
        lambda content: content["pre_tokenizer"].update(use_regex=False),
        lambda content: content["pre_tokenizer"].update(add_prefix_space=True),
        lambda content: content["added_tokens"].append(
            {**content["added_tokens"][0], "id": 1024, "content": "<pad>"}
        ),
        lambda content: content["added_tokens"][0].update(content="</s>"),
        lambda content: content["model"]["vocab"].update({"Ġ!Ġ": 5000}),
        lambda content: content["model"]["merges"].reverse(),
        lambda content: content.update(post_processor=PUTS_AN_A_IN_FRONT),
    ],
)
def test_what_ranks_cannot_say_stays_as_it_is(change, bpe, texts, tmp_path):
    to_hf(GPT(GPTConfig(bpe.vocab_size, 64, 1, 1, 4)), bpe, tmp_path / "out")
    content = json.loads((tmp_path / "out/tokenizer.json").read_text())
    change(content)
    (tmp_path / "out/tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "out/config.json").unlink()
    edit(tmp_path / "out/tokenizer_config.json", eos_token=content["added_tokens"][0]["content"])
    ours = read_tokenizer(tmp_path / "out")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    assert isinstance(ours, HFTokenizer)
    assert ours.encode(texts[7]).tolist() == theirs.encode(texts[7], add_special_tokens=False).ids


def test_padded_gpt2_stays_as_it_is(bpe, tmp_path):
    """Ranks have no rows beyond end of text, as a model whose vocabulary was rounded up has."""
    to_hf(GPT(GPTConfig(1088, 64, 1, 1, 4)), bpe, tmp_path / "out")
    padded = read_tokenizer(tmp_path / "out")
    assert (padded.vocab_size, padded.eot) == (1088, bpe.eot)
    assert padded.encode("x = <|endoftext|>").tolist() == bpe.encode("x = <|endoftext|>").tolist()


def test_other_split_is_refused():
    with pytest.raises(
        ValueError,
        match=r"tokenizer.name=words splits text as GPT-2 does not, which cannot be exported",
    ):
        to_tokenizers(RankedTokenizer("words", r"\w+|\W", bytes_tokenizer().ranks))


def test_export_replaces_only_an_export(tmp_path):
    model, out = our_model("nanodo"), tmp_path / "out"
    out.mkdir()
    to_hf(model, bytes_tokenizer(), out)
    to_hf(our_model("gpt2_untied"), bytes_tokenizer(), out)
    assert from_hf(out).config.activation == "relu2"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    AutoModelForCausalLM.from_pretrained(out).save_pretrained(tmp_path / "tuned")
    (tmp_path / "file").write_text("")
    shutil.copytree(out, tmp_path / "noted")
    (tmp_path / "noted/README.md").write_text("mine")
    for taken in ("tuned", "file", "noted"):
        with pytest.raises(
            ValueError,
            match=rf"out=.*{taken} exists and is no earlier export; name a new or an empty folder",
        ):
            to_hf(model, bytes_tokenizer(), tmp_path / taken)
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize(
    ("name", "value"), [("num_heads", 0), ("vocab_size", 10**19), ("vocab_size", -3)]
)
def test_a_number_of_gpt_json_that_no_model_has_is_refused(tmp_path, name, value):
    out = tmp_path / "out"
    to_hf(GPT(GPTConfig(257, 16, 1, 2, 16)), bytes_tokenizer(), out, "plain")
    (out / "gpt.json").write_text(
        json.dumps(json.loads((out / "gpt.json").read_text()) | {name: value})
    )
    with pytest.raises(ValueError, match=str(value)):
        open_trained(out, None)
