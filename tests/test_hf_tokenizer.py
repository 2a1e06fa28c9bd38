"""Hugging Face tokenizers in and out: the ids that transformers gives, the bytes that they stand
for, and folders that say little."""

import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from conf.text import DataConfig, TokenizerConfig
from data import Validation, pieces, prepare
from data.cache_folders import is_complete
from data.choose_tokenizer import vocabulary
from data.hf_folder import find_folder, read_tokenizer
from data.hf_tokenizer import HFTokenizer
from data.tokenizer import Tokenizer
from launch.config import compose
from launch.plan.plan import make_plan
from launch.run.identity import canonical
from tests.hf_folders import FOLDERS, SAMPLES, SPECIAL, edit, llama2, save, stdlib_texts


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return stdlib_texts()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in FOLDERS.items()}


@pytest.fixture(params=FOLDERS)
def folder(request, folders, tmp_path) -> Path:
    """A folder of each kind, that a test may change."""
    for path in folders[request.param].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


# Theirs behind our interface


def test_ids_are_those_of_transformers(folder, texts):
    ours, theirs = read_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert isinstance(ours, HFTokenizer) and (ours.vocab_size, ours.eot) == (
        len(theirs),
        theirs.eos_token_id,
    )
    for text in [*SAMPLES, *SPECIAL, *texts[::3]]:
        assert (
            ours.encode(text).tolist()
            == theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        )
    for text in [
        *SAMPLES[:2],
        *texts[::10],
    ]:  # with what transformers, and so lm-eval, puts before a text
        whole = theirs(text)["input_ids"]
        assert ours.document(text).tolist() == [*whole, theirs.eos_token_id]
        assert ours.prompt(text) == whole
    assert ours.prompt("") == ([*ours.bos] or [ours.eot])


def test_ids_stand_for_the_bytes_of_the_text(folder, texts):
    tokenizer = read_tokenizer(folder)
    lengths = tokenizer.byte_lengths()
    assert lengths.shape == (tokenizer.vocab_size,)
    for text in [*SAMPLES, *SPECIAL, *texts[::3]]:
        ids = tokenizer.encode(text)
        assert (
            b"".join(tokenizer.decode_bytes([index]) for index in ids)
            == tokenizer.space + text.encode()
        )
        assert tokenizer.decode(ids) == text
        assert lengths[tokenizer.document(text)].sum() == len(text.encode())


def test_later_parts_of_a_document_have_no_beginning(folder, texts):
    tokenizer, lengths = read_tokenizer(folder), read_tokenizer(folder).byte_lengths()
    text = texts[5]
    cut = text.index("\n", len(text) // 2)
    ids = np.concatenate(
        [tokenizer.document(text[:cut], closes=False), tokenizer.document(text[cut:], opens=False)]
    )
    assert (
        ids[: len(tokenizer.bos)].tolist() == [*tokenizer.bos]
        and ids[-1] == tokenizer.eot
        and (ids == tokenizer.eot).sum() == 1
    )
    assert tokenizer.decode(ids[len(tokenizer.bos) : -1]) == text
    assert lengths[ids].sum() == len(text.encode())


def test_names_of_special_tokens_are_text(folder):
    tokenizer = read_tokenizer(folder)
    special = {
        token["id"]
        for token in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
        if token["special"]
    }
    assert len(special) >= 2 and not tokenizer.byte_lengths()[[*special - {tokenizer.eot}]].any()
    for text in [*SPECIAL, "".join(tokenizer.decode([index]) for index in special)]:
        assert not special & {*tokenizer.encode(text).tolist()}


def test_saved_loaded_and_pickled(folder, texts, tmp_path):
    tokenizer = read_tokenizer(folder)
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["tokenizer.json"]
    tokenizer.encode("x")
    for again in (Tokenizer.load(tmp_path / "saved"), pickle.loads(pickle.dumps(tokenizer))):
        assert again == tokenizer and again.hash == tokenizer.hash
        for text in [*SPECIAL, texts[3]]:
            assert again.encode(text).tolist() == tokenizer.encode(text).tolist()
    content = json.loads((tmp_path / "saved/tokenizer.json").read_text())
    for damage in (
        {"huggingface": "{}"},
        {"huggingface": content["huggingface"][:-9]},
        {"bos": None},
        {"more": 1},
    ):
        (tmp_path / "saved/tokenizer.json").write_text(json.dumps(content | damage))
        with pytest.raises(ValueError, match=r"tokenizer.json is damaged; delete it"):
            Tokenizer.load(tmp_path / "saved")


def test_hash_is_that_of_the_ids(folder, tmp_path):
    """Saved again by transformers it is the same tokenizer, whatever the order and the defaults
    that were written."""
    tokenizer = read_tokenizer(folder)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "again")
    path = tmp_path / "again/tokenizer.json"
    saved = json.loads(path.read_text())
    for merges in (
        [" ".join(pair) for pair in saved["model"]["merges"]],
        saved["model"]["merges"],
    ):  # as before tokenizers 0.20, and since
        edit(
            path,
            model=saved["model"] | {"merges": merges},
            truncation={"max_length": 5, "strategy": "LongestFirst", "stride": 0},
        )
        assert read_tokenizer(tmp_path / "again").hash == tokenizer.hash
    hashes = {tokenizer.hash}
    last = saved["model"]["merges"][-1]
    for changes in (
        {"normalizer": {"type": "NFKC"}},
        {"model": saved["model"] | {"merges": [last, *saved["model"]["merges"][:-1]]}},
    ):
        path.write_text(json.dumps(saved | changes))
        hashes.add(read_tokenizer(tmp_path / "again").hash)
    path.write_text(json.dumps(saved))
    other = next(
        token["content"] for token in saved["added_tokens"] if token["id"] != tokenizer.eot
    )
    edit(tmp_path / "again/tokenizer_config.json", eos_token=other)
    hashes.add(read_tokenizer(tmp_path / "again").hash)
    assert len(hashes) == 4


def test_nothing_is_cut_filled_up_or_drawn_by_lot(folder, texts):
    plain = read_tokenizer(folder).encode(texts[0]).tolist()
    content = json.loads((folder / "tokenizer.json").read_text())
    edit(
        folder / "tokenizer.json",
        truncation={"direction": "Right", "max_length": 7, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 10**5},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "x",
        },
        model=content["model"] | {"dropout": 0.5},
    )
    assert read_tokenizer(folder).encode(texts[0]).tolist() == plain


def test_vocabulary_of_a_padded_model(folders, tmp_path):
    """The model's rows count, for the ids above the tokenizer's are ids that it may draw."""
    folder = llama2(tmp_path)
    edit(folder / "config.json", vocab_size=1024)
    tokenizer = read_tokenizer(folder)
    assert (
        tokenizer.vocab_size
        == vocabulary(TokenizerConfig(name="hf", path=str(folder)))
        == len(tokenizer.byte_lengths())
        == 1024
    )
    assert (
        tokenizer.decode_bytes([1023]) == b""
        and tokenizer.hash == read_tokenizer(folders["llama2"]).hash
    )
    edit(folder / "config.json", vocab_size=900)  # an added token for which a fine-tune made no row
    assert read_tokenizer(folder).vocab_size == 1000


@pytest.mark.parametrize(
    ("files", "eot"),
    [
        ({}, "<|end_of_text|>"),
        (
            {"config.json": {"eos_token_id": 1004}},
            "<|end_of_text|>",
        ),  # a chat model's turn ends otherwise than a text
        (
            {"tokenizer_config.json": {"eos_token": {"content": "<|eot_id|>", "lstrip": False}}},
            "<|eot_id|>",
        ),
        (
            {
                "tokenizer_config.json": {"eos_token": None},
                "special_tokens_map.json": {"eos_token": "<|eot_id|>"},
            },
            None,
        ),
        (
            {"tokenizer_config.json": None, "special_tokens_map.json": {"eos_token": "<|eot_id|>"}},
            "<|eot_id|>",
        ),
        (
            {"tokenizer_config.json": None, "config.json": {"eos_token_id": 1002}},
            "<|reserved_special_token_0|>",
        ),
        (
            {"tokenizer_config.json": None, "config.json": {"eos_token_id": [1004, 1001]}},
            "<|eot_id|>",
        ),
        (
            {
                "tokenizer_config.json": None,
                "config.json": {"eos_token_id": None},
                "generation_config.json": {"eos_token_id": [1001]},
            },
            "<|end_of_text|>",
        ),
        (
            {"tokenizer_config.json": {"eos_token": "</s>"}, "config.json": {"eos_token_id": 1004}},
            "<|eot_id|>",
        ),
        ({"tokenizer_config.json": None, "config.json": {"eos_token_id": 5000}}, None),
        ({"tokenizer_config.json": None}, None),
    ],
)
def test_which_token_ends_a_text(files, eot, folders, tmp_path):
    for path in folders["llama3"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for name, content in files.items():
        if content is None:
            (tmp_path / name).unlink()
        else:
            edit(tmp_path / name, **content)
    if eot is None:
        with pytest.raises(
            ValueError,
            match=(
                r"names no token that ends a text; set eos_token in its tokenizer_config.json to"
                r" one of .*tokenizer.json$"
            ),
        ):
            read_tokenizer(tmp_path)
    else:
        assert read_tokenizer(tmp_path).decode([read_tokenizer(tmp_path).eot]) == eot


@pytest.mark.parametrize("kind", FOLDERS)
def test_what_begins_a_document(kind, folders, tmp_path):
    for path in folders[kind].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    token = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"][1]
    single, piece = (
        [{"SpecialToken": {"id": token["content"], "type_id": 0}}],
        [{"Sequence": {"id": "A", "type_id": 0}}],
    )
    entry = {
        token["content"]: {
            "id": token["content"],
            "ids": [token["id"]],
            "tokens": [token["content"]],
        }
    }
    for added, post in {  # none, one, two, and one behind, for which documents have `eot`
        (): None,
        (token["id"],): {
            "type": "TemplateProcessing",
            "single": single + piece,
            "pair": [],
            "special_tokens": entry,
        },
        (token["id"],) * 2: {
            "type": "TemplateProcessing",
            "single": 2 * single + piece,
            "pair": [],
            "special_tokens": entry,
        },
        "behind": {
            "type": "TemplateProcessing",
            "single": piece + single,
            "pair": [],
            "special_tokens": entry,
        },
    }.items():
        edit(tmp_path / "tokenizer.json", post_processor=post)
        edit(
            tmp_path / "tokenizer_config.json",
            eos_token=json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"][0][
                "content"
            ],
        )
        ours, theirs = read_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
        assert ours.bos == (() if added == "behind" else added)
        assert ours.prompt("a b") == theirs("a b")["input_ids"][: -1 if added == "behind" else None]
        assert ours.prompt("") == ([*ours.bos] or [ours.eot])
    # as OPT: the end of one document begins the next
    edit(tmp_path / "tokenizer_config.json", eos_token=token["content"])
    edit(
        tmp_path / "tokenizer.json",
        post_processor={
            "type": "TemplateProcessing",
            "single": single + piece,
            "pair": [],
            "special_tokens": entry,
        },
    )
    assert read_tokenizer(tmp_path).bos == () and read_tokenizer(tmp_path).prompt("") == [
        token["id"]
    ]


def wordpiece(folder: Path) -> Path:
    """BERT in small."""
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer, made.decoder = (
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(),
    )
    made.train_from_iterator(
        stdlib_texts()[:4],
        trainers.WordPieceTrainer(
            vocab_size=800, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False
        ),
    )
    made.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return save(made, folder, eos_token="[SEP]", cls_token="[CLS]")


def unigram(folder: Path) -> Path:
    """T5 in small: every word begins with a space."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = (
        pre_tokenizers.Metaspace(prepend_scheme="always"),
        decoders.Metaspace(prepend_scheme="always"),
    )
    made.train_from_iterator(
        stdlib_texts()[:4],
        trainers.UnigramTrainer(
            vocab_size=800, special_tokens=["</s>", "<unk>"], unk_token="<unk>", show_progress=False
        ),
    )
    return save(made, folder, eos_token="</s>")


@pytest.mark.parametrize(("make", "bos"), [(wordpiece, (1,)), (unigram, ())])
def test_other_kinds_are_read(make, bos, texts, tmp_path):
    tokenizer, theirs = read_tokenizer(make(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.bos == bos and tokenizer.eot == theirs.eos_token_id
    words = " ".join(re.findall("[a-z]+", texts[0]))  # nothing that they would change
    ids = tokenizer.encode(words)
    assert (
        ids.tolist() == theirs(words, add_special_tokens=False)["input_ids"]
        and len(ids) < len(words) / 1.5
    )
    text = tokenizer.decode(ids).removeprefix(" ")
    assert text == words
    # WordPiece spells it before every word, and takes it off no document
    space = tokenizer.decode_bytes(ids).startswith(b" ")
    assert tokenizer.byte_lengths()[tokenizer.document(words)].sum() - len(words.encode()) in (
        0,
        space,
    )


# Shards


def test_shards_do_not_depend_on_the_number_of_processes(folder, tmp_path, texts, monkeypatch):
    """Special tokens' names stay text in the processes too, and what is there of an interrupted
    preparation is kept."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 10_000)
    (tmp_path / "a.txt").write_text(
        "".join(f"{text}\n---\n" for text in [*SAMPLES, *SPECIAL, *texts[:8]]), newline=""
    )
    config = TokenizerConfig(name="hf", path=str(folder))
    data = DataConfig(
        source="text", path=str(tmp_path / "a.txt"), separator="---", validation_fraction=0.3
    )
    found = []
    for workers in (1, 2):
        data.cache, data.workers = str(tmp_path / f"cache{workers}"), workers
        found.append(prepare(data, config))
    corpus = found[0]
    assert (
        corpus.fingerprint == found[1].fingerprint
        and sum(entry["shards"] for entry in corpus.meta["parts"].values()) > 4
    )
    shards = sorted(found[1].folder.rglob("*.bin"))
    kept = shards[0].stat().st_ino
    (found[1].folder / "meta.json").unlink()
    shards[-1].unlink()
    assert (
        prepare(data, config).fingerprint == corpus.fingerprint and shards[0].stat().st_ino == kept
    )
    assert Tokenizer.load(corpus.folder) == corpus.tokenizer == read_tokenizer(folder)
    ids, tokenizer = corpus.train["text"].read(0, len(corpus.train["text"])), corpus.tokenizer
    assert tokenizer.byte_lengths()[ids].sum() == corpus.train["text"].num_bytes
    assert (
        (ids == tokenizer.eot).sum()
        == corpus.train["text"].num_documents
        == sum((ids == token).sum() for token in tokenizer.bos[:1] or [tokenizer.eot])
    )
    by_hand = DataConfig(source="tokens", path=str(corpus.folder), cache=str(tmp_path / "cache3"))
    assert prepare(by_hand, config).train["text"].num_bytes == corpus.train["text"].num_bytes


def test_long_document_is_cut_without_a_space(folders, tmp_path, texts, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 10_000)
    whole = "".join(texts[:6])
    (tmp_path / "a.txt").write_text(whole, newline="")
    data = DataConfig(
        source="text",
        path=str(tmp_path / "a.txt"),
        validation_split="tail",
        cache=str(tmp_path / "cache"),
        workers=1,
    )
    for kind in ("llama2", "metaspace"):
        corpus = prepare(data, TokenizerConfig(name="hf", path=str(folders[kind])))
        stream = [
            tokens.read(0, len(tokens))
            for tokens in (corpus.train["text"], corpus.validation["validation"])
        ]
        assert "".join(corpus.tokenizer.decode(ids[1:-1]) for ids in stream) == whole
        assert is_complete(corpus.folder) and corpus.meta["parts"]["train/text"]["shards"] > 2


def test_what_begins_a_document_is_no_target(folders, tmp_path, texts):
    (tmp_path / "a.txt").write_text("".join(f"{text[:3000]}\n---\n" for text in texts[:20]))
    data = DataConfig(
        source="text",
        path=str(tmp_path / "a.txt"),
        separator="---",
        validation_fraction=0.5,
        cache=str(tmp_path / "cache"),
    )
    corpus = prepare(data, TokenizerConfig(name="hf", path=str(folders["llama3"])))
    source, tokenizer = corpus.validation["validation"], corpus.tokenizer
    for limit in (None, 500):
        validation = Validation(source, 50, tokenizer, limit)
        pairs = [(inputs, targets) for inputs, targets in validation.batches(4)]
        counted = sum(int((targets != -100).sum()) for _, targets in pairs)
        assert counted == validation.num_tokens and not any(
            (targets == tokenizer.bos[0]).any() for _, targets in pairs
        )
        assert any((inputs == tokenizer.bos[0]).any() for inputs, _ in pairs)
    validation = Validation(source, 50, tokenizer)
    assert validation.num_tokens == len(source) - source.num_documents
    assert validation.num_bytes == source.num_bytes


# Configuration


def test_the_folder_is_that_of_init_and_part_of_the_run(folders, tmp_path):
    folder = str(folders["llama3"])
    config = compose(["model=tiny", "tokenizer=hf", f"init.hf={folder}"])
    assert config.tokenizer.path == folder == canonical(config)["tokenizer.path"]
    assert make_plan(config).model.vocab_size == 1256
    assert (
        compose(["tokenizer=hf", f"tokenizer.path={folder}", "init.hf=other"]).tokenizer.path
        == folder
    )
    assert "tokenizer.path" not in canonical(
        compose(["tokenizer=gpt2", f"tokenizer.path={folder}"])
    )
    with pytest.raises(
        ValueError,
        match=(
            r"tokenizer.path=null names no tokenizer; with tokenizer=hf set tokenizer.path=FOLDER,"
            r" or init.hf"
        ),
    ):
        make_plan(compose(["tokenizer=hf"]))


def test_folder_that_is_none_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        ValueError,
        match=(
            r"nobody/nothing is no folder, nor could the hub give it \(.*\); give a folder that"
            r" holds tokenizer.json and"
        ),
    ):
        find_folder("nobody/nothing")
    with pytest.raises(ValueError, match=r"tokenizer.json: no such file; AutoTokenizer"):
        read_tokenizer(tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match=r"tokenizer.json is damaged \(.*\); fetch it again"):
            read_tokenizer(tmp_path)
    for text in ("{}", '{"model": 3}', '{"model": {"type": "New"}}'):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(
            ValueError,
            match=(
                r"tokenizer.json is not a tokenizer that this version of tokenizers reads \(.*\);"
                r" fetch it again"
            ),
        ) as error:
            read_tokenizer(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "part, value, said",
    [
        ("decoder", {"pattern": {"String": "x"}, "content": ""}, r"decoder\[0\]: .* field type"),
        ("continuing_subword_prefix", "##", "does not begin the second part of every merge"),
    ],
)
def test_damage_that_the_library_would_take_or_die_of_is_named(
    folders, tmp_path, part, value, said
):
    """It guesses the step that has no type, and aborts the process at a prefix that merges lack."""
    shutil.copytree(folders["llama3"], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    (content if part in content else content["model"])[part] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"tokenizer.json is .*{said}.*fetch it again"):
        read_tokenizer(tmp_path)
