"""Hugging Face in and out: the same logits, the same weights, the same token ids, and refusals that say why."""

import json
import re
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from data.tokenizer import GPT2_PATTERN, Tokenizer, bytes_tokenizer, train_bpe
from launch import evaluate
from model import GPT, GPTConfig, export
from model.export import to_hf
from model.hf import from_hf, start_from
from model.hf_tokenizer import read_tokenizer, to_tokenizers
from model.sample import generate

transformers = pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRMSNorm  # noqa: E402

GPT2_RANKS = Path(__file__).parents[2] / "shared" / "data" / "gpt2-bpe" / "gpt2.tiktoken"
SAMPLES = ["", "a", "Grüße, 日本語 🙂\u3000\r\n\t x  \n\n y", "<|endoftext|>", " a <|endoftext|> b.", "'s 're 123  4\n   ", "\x00\x7f\u2028\ufeff"]
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300, "hidden_size": 48, "max_position_embeddings": 64}
LLAMA = {**SMALL, "intermediate_size": 100}
THEIRS = {
    "gpt2": GPT2Config(**SMALL),
    "gpt2_untied": GPT2Config(**SMALL, tie_word_embeddings=False, n_inner=100, activation_function="gelu_pytorch_tanh", layer_norm_epsilon=1e-3),
    "gpt2_relu2": GPT2Config(**SMALL, activation_function="relu2"),
    "llama": LlamaConfig(**LLAMA, tie_word_embeddings=False, rms_norm_eps=1e-3),
    "llama_grouped": LlamaConfig(
        **LLAMA, num_key_value_heads=2, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    ),
    "llama_attention_bias": LlamaConfig(**LLAMA, num_key_value_heads=1, attention_bias=True),
    "llama_mlp_bias": LlamaConfig(**LLAMA, mlp_bias=True),
}
OURS = {
    "nanodo": GPTConfig(257, 64, 2, 4, 48),
    "gpt2": GPTConfig(257, 64, 2, 4, 48, bias=True, norm_eps=1e-5, dropout=0.1),
    "gpt2_untied": GPTConfig(257, 64, 2, 4, 48, bias=True, tied=False, mlp_width=100, activation="relu2", z_loss=1e-4),
    "llama": GPTConfig(257, 64, 2, 4, 48, norm="rmsnorm", positions="rope", activation="swiglu", tied=False),
    "llama_grouped": GPTConfig(257, 64, 2, 4, 48, num_kv_heads=2, norm="rmsnorm", positions="rope", rope_base=5e5, activation="swiglu", bias=True),
}


@torch.no_grad()
def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """The model with every weight moved: biases and norms too, which start out alike and would hide a mix-up."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    if isinstance(model, GPT):
        for table in (model.embedding.weight, model.unembedding):
            table[model.config.vocab_size :] = 0.0  # the padding, which stays zero in training
    return model.eval()


def their_model(name: str) -> torch.nn.Module:
    return randomise(AutoModelForCausalLM.from_config(THEIRS[name]))


def our_model(name: str) -> GPT:
    return randomise(GPT(OURS[name]))


def tokens(vocab_size: int = 257) -> torch.Tensor:
    return torch.randint(vocab_size, (2, 64), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def gap(ours: GPT, theirs: torch.nn.Module) -> float:
    """The largest difference between the logits of two models."""
    logits_BxTxV = ours.eval()(tokens())
    assert logits_BxTxV.std() > 0.1
    return (logits_BxTxV - theirs(tokens()).logits).abs().max().item()


# Theirs to ours


@pytest.mark.parametrize("name", THEIRS)
def test_their_logits_are_ours(name, tmp_path, monkeypatch):
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path)
    ours = from_hf(tmp_path)
    assert gap(ours, theirs) < 1e-5
    # Their Llama rounds to fp32 in its norms whatever the weights are; without that there is nothing left but the mapping.
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon))
    assert gap(ours.double(), theirs.double()) < 1e-10
    assert ours.config.dropout == 0.0


def test_shards_bf16_and_old_names_are_read(tmp_path):
    theirs = their_model("gpt2")
    theirs.bfloat16().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    sharded = from_hf(tmp_path / "sharded")
    assert {parameter.dtype for parameter in sharded.parameters()} == {torch.float32}
    theirs.float().transformer.save_pretrained(tmp_path / "old")  # as the hub's own GPT-2: no prefix, and the causal mask among the weights
    weights = load_file(tmp_path / "old" / "model.safetensors")
    assert "h.0.attn.c_attn.weight" in weights
    save_file({**weights, "h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.0.attn.masked_bias": torch.ones(())}, tmp_path / "old" / "model.safetensors")
    old = from_hf(tmp_path / "old")
    assert all(torch.equal(a, b) for a, b in zip(sharded.parameters(), old.parameters(), strict=True))
    assert gap(old, theirs) < 1e-5


def test_llama_of_transformers_4_is_read(tmp_path):
    theirs = their_model("llama_grouped")
    theirs.save_pretrained(tmp_path)
    edit(tmp_path, rope_parameters=None, rope_theta=500.0, rope_scaling=None, head_dim=None)
    save_file(load_file(tmp_path / "model.safetensors") | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)},
              tmp_path / "model.safetensors")  # fmt: skip
    assert gap(from_hf(tmp_path), theirs) < 1e-5


# Ours to theirs


@pytest.mark.parametrize("name", OURS)
def test_our_logits_are_theirs(name, tmp_path):
    ours = our_model(name)
    format = to_hf(ours, bytes_tokenizer(), tmp_path / "out")
    assert format == name.split("_")[0].replace("nanodo", "gpt2")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.float32 and theirs.config.vocab_size == 257
    assert theirs.get_input_embeddings().padding_idx is None  # else fine-tuning would freeze the embedding of end of text
    assert gap(ours, theirs) < 1e-5
    dropouts = {value for key, value in theirs.config.to_dict().items() if key in ("attn_pdrop", "resid_pdrop", "embd_pdrop", "attention_dropout")}
    assert dropouts == {ours.config.dropout}


@pytest.mark.parametrize("name", OURS)
def test_round_trip_is_bitwise(name, tmp_path):
    ours = our_model(name)
    to_hf(ours, bytes_tokenizer(), tmp_path / "once")
    back = from_hf(tmp_path / "once")
    before, after = ours.state_dict(), back.state_dict()
    assert all(torch.equal(after.pop(key), tensor) for key, tensor in before.items())
    assert all(key.endswith("bias") and not tensor.any() for key, tensor in after.items())  # GPT-2 has biases where NanoDO has none
    assert not after or name == "nanodo"
    to_hf(back, bytes_tokenizer(), tmp_path / "twice")
    once, twice = (load_file(tmp_path / folder / "model.safetensors") for folder in ("once", "twice"))
    assert once.keys() == twice.keys() and all(torch.equal(once[key], twice[key]) for key in once)


@pytest.mark.parametrize("name", ["nanodo", "llama_grouped"])
def test_generates_as_ours(name, tmp_path):
    ours, prompt = our_model(name), [*b"def main("]
    to_hf(ours, bytes_tokenizer(), tmp_path / "out")
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    continued = theirs.generate(**tokenizer("def main(", return_tensors="pt"), max_new_tokens=40, do_sample=False, eos_token_id=-1)
    assert continued[0].tolist() == prompt + list(generate(ours, prompt, 40, temperature=0.0))
    assert theirs.generation_config.eos_token_id == theirs.generation_config.bos_token_id == tokenizer.eos_token_id == 256


# Tokenizers


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]


@pytest.fixture(scope="module")
def bpe(texts) -> Tokenizer:
    return train_bpe(texts[:40], 1024)


def gpt2() -> Tokenizer:
    import base64

    if not GPT2_RANKS.exists():
        pytest.skip("no GPT-2 ranks here")
    return Tokenizer("gpt2", GPT2_PATTERN, tuple(base64.b64decode(line.split()[0]) for line in GPT2_RANKS.read_bytes().splitlines()))


@pytest.mark.parametrize("name", ["bytes", "bpe", "gpt2"])
def test_token_ids_are_ours(name, bpe, texts, tmp_path):
    ours = {"bytes": bytes_tokenizer, "bpe": lambda: bpe, "gpt2": gpt2}[name]()
    to_hf(GPT(GPTConfig(ours.vocab_size, 64, 1, 1, 4)), ours, tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in [*SAMPLES, *texts[::3]]:
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text).tolist()
        assert theirs.decode(ids) == text
    assert (len(theirs), theirs.eos_token_id, theirs.bos_token_id, theirs.model_max_length) == (ours.vocab_size, ours.eot, ours.eot, 64)
    assert theirs.decode([ours.eot]) == "<|endoftext|>" and theirs.decode([ours.eot], skip_special_tokens=True) == ""
    back = read_tokenizer(tmp_path / "out")
    assert back.hash == ours.hash and back.ranks == ours.ranks
    theirs.save_pretrained(tmp_path / "again")
    assert read_tokenizer(tmp_path / "again").hash == ours.hash


def test_word_that_no_merge_reaches_is_its_token():
    """tiktoken looks a whole word up before it merges."""
    ours = Tokenizer("odd", GPT2_PATTERN, (*bytes_tokenizer().ranks, b"xyz"))
    assert to_tokenizers(ours).encode("xyz xyz").ids == ours.encode("xyz xyz").tolist() == [256, 32, *b"xyz"]


def test_text_is_split_alike_at_every_character():
    """tiktoken and tokenizers each have a table of what is a letter, a number and white space."""
    starts = [bytes([value]) for value in (*range(128), *range(0xC2, 0xF5))]
    pairs = dict.fromkeys(kind + start for kind in (b"a", b"1", b"!") for start in starts)  # merged where no split lies between them
    ours = Tokenizer("pairs", GPT2_PATTERN, (*(bytes([value]) for value in range(256)), *pairs))
    theirs = to_tokenizers(ours)
    text = "\n".join(f"a{c}1{c}!{c} {c}a" for c in map(chr, (*range(32, 0xD800), *range(0xE000, 0x20000))))
    assert theirs.encode(text).ids == ours.encode(text).tolist()


def test_their_own_gpt2_tokenizer_is_read(texts, tmp_path):
    """tokenizer.json as transformers writes it for GPT-2, with one merge a token."""
    from data.tokenizer import byte_alphabet

    ranks, spelling = gpt2().ranks, {value: character for character, value in byte_alphabet().items()}
    vocab = {"".join(spelling[value] for value in token): rank for rank, token in enumerate(ranks)}
    merges = (GPT2_RANKS.parent / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    pairs = [tuple(line.split()) for line in merges if line]
    transformers.GPT2Tokenizer(vocab={**vocab, "<|endoftext|>": 50256}, merges=pairs).save_pretrained(tmp_path)
    ours, theirs = read_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.hash == gpt2().hash
    assert theirs(texts[3])["input_ids"] == ours.encode(texts[3]).tolist()


# Commands


@pytest.fixture
def run(train, tmp_path):
    """The folder of a small run on a corpus of its own."""
    (tmp_path / "text.txt").write_text("\n\n".join(f"def f{i}(x):\n    return x * {i}" for i in range(400)))
    done = train("model=tiny", "schedule.steps=20", "dir=run", "batch.length=64", "precision=fp32", "data=text", "data.path=text.txt",
                 "data.validation_split=tail", "tokenizer=bpe", "tokenizer.vocab_size=280")  # fmt: skip
    assert done.returncode == 0, done.stderr
    return tmp_path / "run"


def test_run_is_exported_evaluated_and_started_from(run, train, tmp_path, cache, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export.main(["run=run", "out=hf"])
    assert "GPT2LMHeadModel" in capsys.readouterr().out
    corpus = ["data=text", "data.path=text.txt", "data.validation_split=tail", f"data.cache={cache}", "length=64", "precision=fp32"]
    evaluate.main(["run=run", "precision=fp32"])
    loss_of_run = capsys.readouterr().out.splitlines()[1]
    evaluate.main(["run=hf", *corpus])
    assert capsys.readouterr().out.splitlines()[1] == loss_of_run
    with pytest.raises(SystemExit):
        evaluate.main(["run=hf"])
    assert "error: run=hf is a Hugging Face folder, which names no corpus; add data=stdlib" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate.main(["run=hf", "step=3", *corpus])
    assert "leave step out" in capsys.readouterr().err

    start = ["init.hf=hf", "schedule.steps=1", "batch.length=64", "precision=fp32", *corpus[:3], "tokenizer=bpe", "tokenizer.vocab_size=280"]
    refused = train("model=tiny", *start)
    assert (refused.returncode, refused.stderr) == (2, "error: init.hf=hf has another shape than model.bias=false; set model.bias=true\n")
    assert train("model=tiny", "model.bias=true", "dir=next", *start).returncode == 0
    first = json.loads((tmp_path / "next/metrics.jsonl").read_text().splitlines()[0])
    assert first["val/loss"] == pytest.approx(json.loads((run / "summary.json").read_text())["val/loss"], abs=1e-6)
    assert train("model=tiny", *start, "init.run=run").stderr.startswith("error: init.hf=hf and init.run=run both give the weights")


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
        with pytest.raises(ValueError, match=rf"out=.*{taken} exists and is no earlier export; name a new or an empty folder"):
            to_hf(model, bytes_tokenizer(), tmp_path / taken)
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


# Refusals


@pytest.mark.parametrize(
    ("changes", "format", "said"),
    [
        ({"qk_norm": True}, "auto", "format=auto: gpt2 cannot express model.qk_norm=true; train a shape"),
        ({"logit_softcap": 30.0}, "auto", "gpt2 cannot express model.logit_softcap=30.0"),
        ({"positions": "rope"}, "auto", "gpt2 cannot express model.positions=rope"),
        ({"num_kv_heads": 2}, "auto", "gpt2 cannot express model.num_kv_heads=2"),
        ({"norm": "rmsnorm", "positions": "rope", "activation": "relu2"}, "auto", "llama cannot express model.activation=relu2"),
        ({}, "llama", "format=llama: llama cannot express model.norm=layernorm, model.positions=learned, model.activation=gelu; use format=gpt2"),
    ],
)
def test_shape_that_cannot_be_exported_is_refused(changes, format, said, tmp_path):
    model = GPT(GPTConfig(257, 64, 1, 4, 48, **changes))
    with pytest.raises(ValueError, match=re.escape(said)):
        to_hf(model, bytes_tokenizer(), tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


def edit(folder: Path, **changes) -> None:
    """Changes keys of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("gpt2", {"model_type": "opt"}, "config.json: model_type=opt is not among gpt2, llama"),
        ("gpt2", {"activation_function": "gelu"}, "activation_function=gelu is not what a GPT computes (gelu_new, "),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True is not"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope_type=llama3 is not what a GPT computes (default)"),
        ("llama", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "type=linear is not"),
        ("llama", {"head_dim": 16}, "head_dim=16 is not the width over the heads, 12"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act=gelu is not"),
        ("gpt2", {"n_layer": 3}, "h.2.ln_1.weight is missing"),
        ("gpt2", {"n_layer": 1}, "h.1.attn.c_attn.bias has no place in a GPT"),
        ("llama", {"intermediate_size": 99}, "layers.0.mlp.up_proj.weight does not have the shape that config.json says"),
        ("llama", {"attention_bias": True}, "self_attn.q_proj.bias or layers.0.self_attn.k_proj.bias or layers.0.self_attn.v_proj.bias is missing"),
        ("gpt2", {"n_embd": None}, "config.json cannot be read (TypeError: "),
    ],
)
def test_model_that_a_gpt_is_not_is_refused(name, changes, said, tmp_path):
    their_model(name).save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        from_hf(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_folder_without_safe_weights_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"config.json: no such file"):
        from_hf(tmp_path)
    their_model("gpt2").save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"Error while deserializing"):
        from_hf(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has no model.safetensors; save_pretrained .* writes it, from pickled weights .* they can run code"):
        from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json cannot be read \(JSONDecodeError"):
        from_hf(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "no/such/folder"):
        with pytest.raises(ValueError, match=rf"{name} is no folder, nor could the hub give it \(\w+Error: .*\); give a folder") as error:
            from_hf(name)
        assert "\n" not in str(error.value)


def test_start_from_another_shape_or_vocabulary_is_refused(tmp_path, bpe):
    to_hf(our_model("llama_grouped"), bytes_tokenizer(), tmp_path / "out")
    start = {"norm": "rmsnorm", "positions": "rope", "rope_base": 5e5, "activation": "swiglu", "bias": True, "norm_eps": 1e-6}
    same = GPT(GPTConfig(257, 32, 2, 4, 48, num_kv_heads=2, mlp_width=128, dropout=0.1, z_loss=1e-4, **start))  # a shorter one, without a table
    start_from(same, str(tmp_path / "out"), bytes_tokenizer())
    assert torch.equal(same.blocks[1].attention.qkv.weight, our_model("llama_grouped").blocks[1].attention.qkv.weight)
    other = GPT(GPTConfig(257, 64, 2, 4, 96, tied=False, **start))
    said = (
        "has another shape than model.width=96 model.num_kv_heads=4 model.mlp_width=256 model.tied=false; "
        "set model.width=48 model.num_kv_heads=2 model.mlp_width=128 model.tied=true"
    )
    with pytest.raises(ValueError, match=re.escape(said)):
        start_from(other, str(tmp_path / "out"), bytes_tokenizer())
    swapped = Tokenizer("bytes", bytes_tokenizer().pattern, bytes_tokenizer().ranks[::-1])  # as many entries, and others
    for tokenizer in (bpe, swapped):
        with pytest.raises(ValueError, match=r"init.hf=.* has a vocabulary of 257 entries, and the tokenizer b\w+ another.*; choose the tokenizer"):
            start_from(same, str(tmp_path / "out"), tokenizer)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content["model"].update(type="Unigram"), "its kind is Unigram"),
        (lambda content: content["model"].update(byte_fallback=True), "its kind is BPE"),
        (lambda content: content.update(normalizer={"type": "NFC"}), "it normalises text"),
        (lambda content: content.update(pre_tokenizer={"type": "Metaspace"}), "it splits text by Metaspace"),
        (lambda content: content.update(pre_tokenizer=None), "it splits text by None"),
        (lambda content: content["pre_tokenizer"].update(use_regex=False), "it splits text by ByteLevel"),
        (lambda content: content["pre_tokenizer"].update(add_prefix_space=True), "it adds a space before a text"),
        (lambda content: content["added_tokens"].append({"id": 1024, "content": "<pad>"}), "its special tokens are <|endoftext|>, <pad>"),
        (lambda content: content["added_tokens"].clear(), "its special tokens are ; choose"),
        (lambda content: content["model"]["vocab"].update({"Ġ": 5000}), "its ids have gaps or are not bytes"),
        (lambda content: content["model"]["merges"].reverse(), "its ids are not in the order of its merges"),
        (lambda content: content["model"].pop("vocab"), "is not a byte-level BPE"),
    ],
)
def test_tokenizer_of_another_kind_is_refused(change, said, bpe, tmp_path):
    to_tokenizers(bpe).save(str(tmp_path / "tokenizer.json"))
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(said)):
        read_tokenizer(tmp_path)


def test_missing_tokenizer_and_other_split_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer.json: no such file; AutoTokenizer"):
        read_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer.name=words splits text as GPT-2 does not, which cannot be exported"):
        to_tokenizers(Tokenizer("words", r"\w+|\W", bytes_tokenizer().ranks))


# lm-evaluation-harness


def test_harness_scores_an_export_as_we_do(tmp_path, monkeypatch):
    """`pip install -c constraints.txt lm-eval` makes this run (torchvision, which nothing of it needs, must stay out: beside a CPU build
    of torch it breaks the import of transformers). The harness picks the choice of each document whose log-probability is highest."""
    lm_eval, tasks = pytest.importorskip("lm_eval"), pytest.importorskip("lm_eval.tasks")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    ours, tokenizer = our_model("gpt2"), bytes_tokenizer()
    to_hf(ours, tokenizer, tmp_path / "out")
    documents = [{"text": f"def f{i}(x):", "choices": [" return x", " pass # nothing", f" {i}"], "label": i % 3} for i in range(20)]
    (tmp_path / "local.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "local.yaml").write_text(
        f"task: local\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/local.jsonl}}}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{text}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: label\ntarget_delimiter: ''\n"
        "metric_list: [{metric: acc}]\n"
    )
    manager = tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    arguments = {"pretrained": str(tmp_path / "out"), "device": "cpu", "dtype": "float32"}
    found = lm_eval.simple_evaluate("hf", model_args=arguments, tasks=["local"], task_manager=manager, bootstrap_iters=0, batch_size=4)

    def log_p(text: str, choice: str) -> float:
        ids = torch.from_numpy(tokenizer.encode(text + choice).astype("int64"))[None]
        targets = ids[:, 1:].masked_fill(torch.arange(1, ids.shape[1]) < len(text), -100)
        return -ours.loss(ids[:, :-1], targets)[0].item()

    scores = [[log_p(document["text"], choice) for choice in document["choices"]] for document in documents]
    theirs = [[response[0] for response in sample["filtered_resps"]] for sample in found["samples"]["local"]]
    torch.testing.assert_close(torch.tensor(theirs), torch.tensor(scores), rtol=0, atol=1e-4)
    right = [max(range(3), key=row.__getitem__) == document["label"] for row, document in zip(scores, documents, strict=True)]
    assert found["results"]["local"]["acc,none"] == pytest.approx(sum(right) / 20)
