"""Hugging Face in and out: the same logits, the same weights, the same token ids, and refusals that
say why."""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from data.hf_folder import read_tokenizer
from data.tokenizer import RankedTokenizer, bytes_tokenizer, train_bpe
from launch import evaluate
from model import GPT, GPTConfig, export, sample
from model.export import to_hf
from model.hf import from_hf, start_from
from model.sample import Sampling, generate

transformers = pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRMSNorm  # noqa: E402

from tests.hf_folders import FOLDERS  # noqa: E402

SMALL = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
    "hidden_size": 48,
    "max_position_embeddings": 64,
}
LLAMA = {**SMALL, "intermediate_size": 100}
# Llama 3.1's positions in small: of the 6 angles of a head, 1 is kept, 2 are slowed in part and 3
# in full, and 64 tokens are twice the old length.
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 0.6,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
THEIRS = {
    "gpt2": GPT2Config(**SMALL),
    "gpt2_untied": GPT2Config(
        **SMALL,
        tie_word_embeddings=False,
        n_inner=100,
        activation_function="gelu_pytorch_tanh",
        layer_norm_epsilon=1e-3,
    ),
    "gpt2_relu2": GPT2Config(**SMALL, activation_function="relu2"),
    "llama": LlamaConfig(**LLAMA, tie_word_embeddings=False, rms_norm_eps=1e-3),
    "llama_grouped": LlamaConfig(
        **LLAMA,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    ),
    "llama_3.1": LlamaConfig(**LLAMA, rope_parameters=SCALED),
    "llama_linear": LlamaConfig(
        **LLAMA, rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 4}
    ),
    "llama_attention_bias": LlamaConfig(**LLAMA, num_key_value_heads=1, attention_bias=True),
    "llama_mlp_bias": LlamaConfig(**LLAMA, mlp_bias=True),
}
OURS = {
    "nanodo": GPTConfig(257, 64, 2, 4, 48),
    "gpt2": GPTConfig(257, 64, 2, 4, 48, bias=True, norm_eps=1e-5, dropout=0.1),
    "gpt2_untied": GPTConfig(
        257, 64, 2, 4, 48, bias=True, tied=False, mlp_width=100, activation="relu2", z_loss=1e-4
    ),
    "llama": GPTConfig(
        257, 64, 2, 4, 48, norm="rmsnorm", positions="rope", activation="swiglu", tied=False
    ),
    "llama_3.1": GPTConfig(
        257,
        64,
        2,
        4,
        48,
        norm="rmsnorm",
        positions="rope",
        activation="swiglu",
        rope_base=500.0,
        rope_scaling="llama3",
        rope_factor=8.0,
        rope_low_factor=0.6,
        rope_original_length=32,
    ),
    "llama_linear": GPTConfig(
        257,
        64,
        2,
        4,
        48,
        norm="rmsnorm",
        positions="rope",
        activation="swiglu",
        rope_scaling="linear",
        rope_factor=3.0,
    ),
    "llama_grouped": GPTConfig(
        257,
        64,
        2,
        4,
        48,
        num_kv_heads=2,
        norm="rmsnorm",
        positions="rope",
        rope_base=5e5,
        activation="swiglu",
        bias=True,
    ),
}


@torch.no_grad()
def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """The model with every weight moved: biases and norms too, which start out alike and would hide
    a mix-up."""
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
    # Their Llama rounds to fp32 in its norms whatever the weights are; without that there is
    # nothing left but the mapping.
    monkeypatch.setattr(
        LlamaRMSNorm,
        "forward",
        lambda self, x: F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon),
    )
    assert gap(ours.double(), theirs.double()) < 1e-10
    assert ours.config.dropout == 0.0


def test_shards_bf16_and_old_names_are_read(tmp_path):
    theirs = their_model("gpt2")
    theirs.bfloat16().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    sharded = from_hf(tmp_path / "sharded")
    assert {parameter.dtype for parameter in sharded.parameters()} == {torch.float32}
    # as the hub's own GPT-2: no prefix, and the causal mask among the weights
    theirs.float().transformer.save_pretrained(tmp_path / "old")
    weights = load_file(tmp_path / "old" / "model.safetensors")
    assert "h.0.attn.c_attn.weight" in weights
    save_file(
        {
            **weights,
            "h.0.attn.bias": torch.ones(1, 1, 64, 64),
            "h.0.attn.masked_bias": torch.ones(()),
        },
        tmp_path / "old" / "model.safetensors",
    )
    old = from_hf(tmp_path / "old")
    assert all(
        torch.equal(a, b) for a, b in zip(sharded.parameters(), old.parameters(), strict=True)
    )
    assert gap(old, theirs) < 1e-5


@pytest.mark.parametrize(
    ("name", "scaling"),
    [
        ("llama_grouped", None),
        ("llama_3.1", {key: value for key, value in SCALED.items() if key != "rope_theta"}),
        ("llama_linear", {"type": "linear", "factor": 4.0}),
    ],
)
def test_llama_of_transformers_4_is_read(name, scaling, tmp_path):
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path)
    edit(tmp_path, rope_parameters=None, rope_theta=500.0, rope_scaling=scaling, head_dim=None)
    save_file(
        load_file(tmp_path / "model.safetensors")
        | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)},
        tmp_path / "model.safetensors",
    )
    assert gap(from_hf(tmp_path), theirs) < 1e-5


def test_the_older_name_of_a_scaling_holds_where_both_are_there(tmp_path):
    their_model("llama_grouped").save_pretrained(tmp_path)
    edit(tmp_path, rope_scaling={"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0})
    assert gap(from_hf(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)) < 1e-5
    assert from_hf(tmp_path).config.rope_scaling == "linear"


# Ours to theirs


@pytest.mark.parametrize("name", OURS)
def test_our_logits_are_theirs(name, tmp_path):
    ours = our_model(name)
    format = to_hf(ours, bytes_tokenizer(), tmp_path / "out")
    assert format == name.split("_")[0].replace("nanodo", "gpt2")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.float32 and theirs.config.vocab_size == 257
    # else fine-tuning would freeze the embedding of end of text
    assert theirs.get_input_embeddings().padding_idx is None
    assert gap(ours, theirs) < 1e-5
    dropouts = {
        value
        for key, value in theirs.config.to_dict().items()
        if key in ("attn_pdrop", "resid_pdrop", "embd_pdrop", "attention_dropout")
    }
    assert dropouts == {ours.config.dropout}


@pytest.mark.parametrize("name", OURS)
def test_round_trip_is_bitwise(name, tmp_path):
    ours = our_model(name)
    to_hf(ours, bytes_tokenizer(), tmp_path / "once")
    back = from_hf(tmp_path / "once")
    before, after = ours.state_dict(), back.state_dict()
    assert all(torch.equal(after.pop(key), tensor) for key, tensor in before.items())
    # GPT-2 has biases where NanoDO has none
    assert all(key.endswith("bias") and not tensor.any() for key, tensor in after.items())
    assert not after or name == "nanodo"
    to_hf(back, bytes_tokenizer(), tmp_path / "twice")
    once, twice = (
        load_file(tmp_path / folder / "model.safetensors") for folder in ("once", "twice")
    )
    assert once.keys() == twice.keys() and all(torch.equal(once[key], twice[key]) for key in once)


@pytest.mark.parametrize("name", ["nanodo", "llama_grouped"])
def test_generates_as_ours(name, tmp_path):
    ours, prompt = our_model(name), [*b"def main("]
    to_hf(ours, bytes_tokenizer(), tmp_path / "out")
    theirs, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    continued = theirs.generate(
        **tokenizer("def main(", return_tensors="pt"),
        max_new_tokens=40,
        do_sample=False,
        eos_token_id=-1,
    )
    assert continued[0].tolist() == prompt + list(
        generate(ours, prompt, 40, Sampling(temperature=0.0))
    )
    assert (
        theirs.generation_config.eos_token_id
        == theirs.generation_config.bos_token_id
        == tokenizer.eos_token_id
        == 256
    )


# Commands


@pytest.fixture
def run(train, tmp_path):
    """The folder of a small run on a corpus of its own."""
    (tmp_path / "text.txt").write_text(
        "\n\n".join(f"def f{i}(x):\n    return x * {i}" for i in range(400))
    )
    done = train(
        "model=tiny",
        "schedule.steps=20",
        "dir=run",
        "batch.length=64",
        "precision=fp32",
        "data=text",
        "data.path=text.txt",
        "data.validation_split=tail",
        "tokenizer=bpe",
        "tokenizer.vocab_size=280",
    )
    assert done.returncode == 0, done.stderr
    return tmp_path / "run"


def test_run_is_exported_evaluated_and_started_from(
    run, train, tmp_path, cache, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    export.main(["run=run", "out=hf"])
    assert "GPT2LMHeadModel" in capsys.readouterr().out
    corpus = [
        "data=text",
        "data.path=text.txt",
        "data.validation_split=tail",
        f"data.cache={cache}",
        "precision=fp32",
    ]
    evaluate.main(["run=run", "precision=fp32"])
    said = capsys.readouterr().out
    export.main(["run=run", "out=plain", "format=plain"])
    assert "GPT(GPTConfig(" in capsys.readouterr().out
    for folder in ("hf", "plain"):
        # at the length of the run, which the export tells
        evaluate.main([f"run={folder}", *corpus])
        assert capsys.readouterr().out == said.replace(said.split(",")[0], folder)
        sample.main(
            [f"run={folder}", "prompt=def f", "tokens=20", "temperature=0", "precision=fp32"]
        )
        text = capsys.readouterr().out
        sample.main(["run=run", "prompt=def f", "tokens=20", "temperature=0", "precision=fp32"])
        assert capsys.readouterr().out == text
    with pytest.raises(SystemExit):
        evaluate.main(["run=hf"])
    assert (
        "error: run=hf is a Hugging Face folder, which names no corpus; add data=stdlib"
        in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        evaluate.main(["run=hf", "step=3", *corpus])
    assert "leave step out" in capsys.readouterr().err

    start = [
        "init.hf=hf",
        "schedule.steps=1",
        "batch.length=64",
        "precision=fp32",
        *corpus[:3],
        "tokenizer=bpe",
        "tokenizer.vocab_size=280",
    ]
    refused = train("model=tiny", *start)
    assert (refused.returncode, refused.stderr) == (
        2,
        "error: init.hf=hf has another shape than model.bias=false; set model.bias=true\n",
    )
    assert train("model=tiny", "model.bias=true", "dir=next", *start).returncode == 0
    first = json.loads((tmp_path / "next/metrics.jsonl").read_text().splitlines()[0])
    assert first["val/loss"] == pytest.approx(
        json.loads((run / "summary.json").read_text())["val/loss"], abs=1e-6
    )
    assert train("model=tiny", *start, "init.run=run").stderr.startswith(
        "error: init.hf=hf and init.run=run both give the weights"
    )


@pytest.mark.parametrize("kind", ["llama3", "llama2"])
def test_run_on_a_folder_of_hugging_face(kind, train, tmp_path, cache, capsys, monkeypatch):
    """A Llama with its own tokenizer, and rows that no token has; the folder is gone afterwards."""
    monkeypatch.chdir(tmp_path)
    FOLDERS[kind](tmp_path / "theirs")
    theirs = randomise(
        AutoModelForCausalLM.from_config(
            LlamaConfig(
                **LLAMA | {"vocab_size": 1280}, rope_parameters=SCALED, tie_word_embeddings=True
            )
        )
    )
    theirs.save_pretrained("theirs")
    documents = [f"def f{i}(x):\n    return x * {i}  # <|eot_id|> é" for i in range(200)]
    (tmp_path / "text.txt").write_text("".join(f"{text}\n---\n" for text in documents))
    data = [
        "data=text",
        "data.path=text.txt",
        "data.separator=---",
        "data.validation_fraction=0.2",
        f"data.cache={cache}",
    ]
    evaluate.main(["run=theirs", "length=64", "precision=fp32", *data])
    said = capsys.readouterr().out.splitlines()[1]
    loss, bits = float(re.search(r"loss (\S+),", said)[1]), float(re.search(r"(\S+) bits", said)[1])

    shape = [
        "model.num_layers=2",
        "model.num_heads=4",
        "model.width=48",
        "model.mlp_width=100",
        "model.norm=rmsnorm",
        "model.positions=rope",
        "model.activation=swiglu",
        "model.rope_base=500",
        "model.max_length=64",
    ]
    start = [
        "init.hf=theirs",
        "schedule.steps=2",
        "batch.length=64",
        "precision=fp32",
        "dir=run",
        "evaluation.tokens=null",
        "evaluation.every=1",
        *data,
        *shape,
    ]
    bytes_ = train(*start)
    assert (bytes_.returncode, bytes_.stderr) == (
        2,
        (
            "error: init.hf=theirs has a vocabulary of 1,280 entries, and the tokenizer bytes"
            " another, of 257; choose the tokenizer that it was trained with, tokenizer=hf\n"
        ),
    )
    scaled = re.search(r"; set (.*)\n", train("tokenizer=hf", *start).stderr)[1].split()
    assert [*map(str, scaled)] == [
        f"model.{key}"
        for key in (
            "rope_scaling=llama3",
            "rope_factor=8.0",
            "rope_original_length=32",
            "rope_low_factor=0.6",
        )
    ]
    done = train("tokenizer=hf", *start, *scaled)
    assert done.returncode == 0, done.stderr
    first = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert first["val/loss"] == pytest.approx(loss, abs=1e-4) and first[
        "val/bits_per_byte"
    ] == pytest.approx(bits, abs=1e-4)
    config = AutoTokenizer.from_pretrained("theirs")
    ids = [config(text)["input_ids"] for text in documents]

    shutil.rmtree("theirs")
    last = json.loads((tmp_path / "run/summary.json").read_text())
    sample.main(["run=run", "prompt=def f", "tokens=20", "temperature=0"])
    assert capsys.readouterr().out.startswith("def f")
    evaluate.main(["run=run", "precision=fp32"])
    assert f"loss {last['val/loss']:.4f}, " in capsys.readouterr().out
    export.main(["run=run", "out=hf"])
    assert [AutoTokenizer.from_pretrained("hf")(text)["input_ids"] for text in documents] == ids
    assert AutoModelForCausalLM.from_pretrained("hf").config.rope_parameters == SCALED
    capsys.readouterr()
    evaluate.main(["run=hf", "length=64", "precision=fp32", *data])
    assert f"loss {last['val/loss']:.4f}, " in capsys.readouterr().out


# Refusals


@pytest.mark.parametrize(
    ("changes", "format", "said"),
    [
        (
            {"qk_norm": True},
            "auto",
            (
                "format=auto: gpt2 cannot express model.qk_norm=true; use format=plain, or train a"
                " shape"
            ),
        ),
        ({"logit_softcap": 30.0}, "auto", "gpt2 cannot express model.logit_softcap=30.0"),
        ({"positions": "rope"}, "auto", "gpt2 cannot express model.positions=rope"),
        ({"num_kv_heads": 2}, "auto", "gpt2 cannot express model.num_kv_heads=2"),
        (
            {"norm": "rmsnorm", "positions": "rope", "activation": "relu2"},
            "auto",
            "llama cannot express model.activation=relu2",
        ),
        (
            {},
            "llama",
            (
                "format=llama: llama cannot express model.norm=layernorm, model.positions=learned,"
                " model.activation=gelu; use format=gpt2"
            ),
        ),
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
        (
            "gpt2",
            {"activation_function": "gelu"},
            "activation_function=gelu is not what a GPT computes (gelu_new, ",
        ),
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx=true is not",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}},
            "factor is missing, which rope_type=llama3 needs",
        ),
        (
            "llama",
            {"rope_parameters": SCALED | {"high_freq_factor": 0.5}},
            "high_freq_factor=0.5 does not exceed low_freq_factor=0.6",
        ),
        (
            "llama",
            {"rope_parameters": SCALED | {"rope_type": "yarn"}},
            "rope_type=yarn is not what a GPT computes (default, linear, llama3)",
        ),
        (
            "llama",
            {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2}},
            "rope_type=dynamic is not",
        ),
        (
            "llama",
            {"rope_parameters": SCALED | {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5 is not",
        ),
        ("llama", {"head_dim": 16}, "head_dim=16 is not the width over the heads, 12"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act=gelu is not"),
        ("gpt2", {"n_layer": 3}, "h.2.ln_1.weight is missing"),
        ("gpt2", {"n_layer": 1}, "h.1.attn.c_attn.bias has no place in a GPT"),
        (
            "llama",
            {"intermediate_size": 99},
            "layers.0.mlp.up_proj.weight does not have the shape that config.json says",
        ),
        (
            "llama",
            {"attention_bias": True},
            (
                "self_attn.q_proj.bias or layers.0.self_attn.k_proj.bias or"
                " layers.0.self_attn.v_proj.bias is missing"
            ),
        ),
        ("gpt2", {"n_embd": None}, "n_embd is missing"),
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
    with pytest.raises(
        ValueError, match=r"model.safetensors is cut off or damaged \(.*\); fetch it again"
    ):
        from_hf(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ValueError,
        match=(
            r"has no model.safetensors; save_pretrained .* writes it, from pickled weights .* they"
            r" can run code"
        ),
    ):
        from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is damaged \(.*\); fetch it again"):
        from_hf(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "no/such/folder"):
        with pytest.raises(
            ValueError,
            match=(
                rf"{name} is no folder, nor could the hub give it \(\w+Error: .*\); give a folder"
            ),
        ) as error:
            from_hf(name)
        assert "\n" not in str(error.value)


LFS = (
    b"version https://git-lfs.github.com/spec/v1\noid"
    b" sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A GPT-2 and a Llama as we export them."""
    found = {
        "gpt2": tmp_path_factory.mktemp("gpt2") / "out",
        "llama": tmp_path_factory.mktemp("llama") / "out",
    }
    to_hf(our_model("gpt2"), bytes_tokenizer(), found["gpt2"])
    to_hf(
        GPT(replace(OURS["llama_grouped"], tied=False, bias=False)),
        bytes_tokenizer(),
        found["llama"],
    )
    return found


def change(folder: Path, *removed: str, **changed: torch.Tensor) -> None:
    """Changes tensors of a folder; the first part of a name, transformer or model, is left out, and
    __ stands for a dot."""
    tensors = load_file(folder / WEIGHTS)
    prefix = "transformer." if "transformer.wte.weight" in tensors else "model."
    for name in removed:
        del tensors[prefix + name]
    tensors |= {
        ("" if name.startswith("lm_head") else prefix) + name.replace("__", "."): tensor
        for name, tensor in changed.items()
    }
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def replaced(name: str, by: bytes | str) -> Callable[[Path], None]:
    """Puts bytes, a folder ("folder"), a pipe ("pipe") or a link to itself ("link") in the place of
    a file."""

    def put(folder: Path) -> None:
        path = folder / name
        path.unlink(missing_ok=True)
        if isinstance(by, bytes):
            path.write_bytes(by)
        else:
            {
                "folder": path.mkdir,
                "pipe": lambda: os.mkfifo(path),
                "link": lambda: path.symlink_to(path),
            }[by]()

    return put


def indexed(content: object) -> Callable[[Path], None]:
    """Takes the whole file of weights away and leaves an index."""

    def put(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / INDEX).write_text(json.dumps(content))

    return put


def named(file: str) -> Callable[[Path], None]:
    return indexed({"weight_map": {"model.norm.weight": file}})


def keys(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder, **changes)


HOSTILE = [
    # config.json: other JSON, other files
    ("gpt2", replaced("config.json", b""), "config.json is damaged"),
    ("gpt2", replaced("config.json", b"[]"), "config.json is damaged (Expected object, got array)"),
    (
        "gpt2",
        replaced("config.json", b"[" * 200_000),
        "config.json is damaged (it is nested deeper",
    ),
    ("gpt2", replaced("config.json", b'{"a":' * 200_000), "config.json is damaged"),
    ("gpt2", replaced("config.json", b"\xff\xfe"), "config.json is damaged"),
    ("gpt2", replaced("config.json", LFS), "config.json is a Git LFS pointer"),
    ("gpt2", replaced("config.json", "pipe"), "config.json is no regular file"),
    ("gpt2", replaced("config.json", "folder"), "config.json is no regular file"),
    ("gpt2", replaced("config.json", "link"), "config.json cannot be read (Too many levels"),
    # config.json: keys
    ("gpt2", keys(model_type=["gpt2"]), 'model_type=["gpt2"] is not among gpt2, llama'),
    ("gpt2", keys(n_layer=0), "n_layer=0 is out of range; it must be at least 1"),
    (
        "gpt2",
        keys(n_layer=10**9),
        "n_layer=1000000000 is out of range; it must be at least 1 and at most 1000",
    ),
    ("gpt2", keys(n_layer=2.5), "n_layer=2.5 is of the wrong type; it must be int"),
    ("gpt2", keys(n_layer=True), "n_layer=true is of the wrong type"),
    ("gpt2", keys(n_layer="2"), "n_layer=2 is of the wrong type"),
    ("gpt2", keys(n_embd=10**13), "n_embd=10000000000000"),
    ("gpt2", keys(n_inner=10**13), "n_inner=10000000000000"),
    ("gpt2", keys(n_positions=2**63), "n_positions=9223372036854775808"),
    ("gpt2", keys(n_head=0), "n_head=0 is out of range"),
    ("gpt2", keys(n_head=5), "n_embd=48 is not divisible by n_head=5"),
    ("gpt2", keys(vocab_size=-1), "vocab_size=-1 is out of range"),
    ("gpt2", keys(vocab_size=10**12), "vocab_size=1000000000000 is out of range"),
    ("gpt2", keys(layer_norm_epsilon=float("nan")), "layer_norm_epsilon=nan is not finite"),
    ("gpt2", keys(layer_norm_epsilon=-1e-5), "layer_norm_epsilon=-1e-05 is out of range"),
    (
        "gpt2",
        keys(layer_norm_epsilon=[]),
        "layer_norm_epsilon=[] is of the wrong type; it must be float",
    ),
    (
        "gpt2",
        keys(tie_word_embeddings="yes"),
        "tie_word_embeddings=yes is of the wrong type; it must be bool",
    ),
    ("gpt2", keys(activation_function={}), "activation_function={} is not what a GPT computes"),
    ("llama", keys(rope_parameters=[1]), "rope_parameters=[1] is of the wrong type"),
    ("llama", keys(rope_parameters={"rope_theta": 0}), "rope_theta=0.0 is out of range"),
    (
        "llama",
        keys(rope_parameters={"rope_type": "linear", "factor": "8"}),
        "factor=8 is of the wrong type",
    ),
    (
        "llama",
        keys(rope_parameters={"rope_type": "linear", "factor": float("inf")}),
        "factor=inf is not finite",
    ),
    (
        "llama",
        keys(num_key_value_heads=3),
        "num_key_value_heads=3 does not divide num_attention_heads=4",
    ),
    ("llama", keys(head_dim="12"), "head_dim=12 is not the width over the heads"),
    ("llama", keys(attention_bias=3), "attention_bias=3 is of the wrong type"),
    # weights: other files
    ("gpt2", replaced(WEIGHTS, b""), "model.safetensors is cut off or damaged"),
    (
        "gpt2",
        replaced(WEIGHTS, LFS),
        "model.safetensors is a Git LFS pointer, its content was not downloaded; run git lfs pull",
    ),
    ("gpt2", replaced(WEIGHTS, b"\xff" * 100), "model.safetensors is cut off or damaged"),
    ("gpt2", replaced(WEIGHTS, "pipe"), "model.safetensors is no regular file"),
    ("gpt2", replaced(WEIGHTS, "folder"), "model.safetensors is no regular file"),
    ("gpt2", replaced(WEIGHTS, "link"), "has no model.safetensors"),
    # weights: their index
    ("llama", replaced(INDEX, LFS), None),
    ("llama", indexed([]), "index.json is damaged (Expected object, got array)"),
    ("llama", indexed({"weight_map": {}}), "weight_map names no file"),
    (
        "llama",
        indexed({"weight_map": {"a": 3}}),
        "index.json is damaged (weight_map[...]: Expected str, got int)",
    ),
    (
        "llama",
        named("../out/model.safetensors"),
        "weight_map names ../out/model.safetensors, which is no .safetensors file of the folder",
    ),
    ("llama", named("/etc/passwd"), "weight_map names /etc/passwd, which is no"),
    (
        "llama",
        named("/tmp/model.safetensors"),
        "weight_map names /tmp/model.safetensors, which is no",
    ),
    ("llama", named(""), 'weight_map names "", which is no'),
    ("llama", named("x" * 5000 + ".safetensors"), ", which its index names"),
    ("llama", named("a\0b.safetensors"), 'has no "a\\u0000b.safetensors", which its index names'),
    # weights: tensors
    ("gpt2", lambda folder: change(folder, "h.1.mlp.c_fc.bias"), "h.1.mlp.c_fc.bias is missing"),
    ("gpt2", lambda folder: change(folder, "wte.weight"), "wte.weight is missing"),
    ("gpt2", lambda folder: change(folder, score=torch.ones(2)), "score has no place in a GPT"),
    (
        "gpt2",
        lambda folder: change(folder, wte__weight=torch.tensor(1.0)),
        "wte.weight does not have the shape that config.json says",
    ),
    (
        "gpt2",
        lambda folder: change(folder, wpe__weight=torch.ones(2, 48)),
        "wpe.weight does not have the shape that config.json says (2 x 48, ",
    ),
    (
        "gpt2",
        lambda folder: change(folder, h__1__ln_1__bias=torch.ones(0)),
        "ln_1.bias does not have the shape that config.json says",
    ),
    (
        "gpt2",
        lambda folder: change(folder, h__1__mlp__c_fc__weight=torch.ones(192, 48)),
        "(192 x 48, not 48 x 192)",
    ),
    (
        "gpt2",
        lambda folder: change(folder, ln_f__bias=torch.ones(48, dtype=torch.int8)),
        "ln_f.bias holds I8, and weights are F64, F32, F16, BF16",
    ),
    (
        "gpt2",
        lambda folder: change(folder, wte__weight=torch.ones(257, 48, dtype=torch.int64)),
        "wte.weight holds I64",
    ),
    (
        "gpt2",
        lambda folder: change(folder, ln_f__bias=torch.ones(48, dtype=torch.bool)),
        "ln_f.bias holds BOOL",
    ),
    (
        "llama",
        lambda folder: change(folder, norm__weight=torch.ones(48).to(torch.float8_e4m3fn)),
        "norm.weight holds F8_E4M3",
    ),
    (
        "llama",
        lambda folder: change(folder, norm__weight=torch.full((48,), torch.nan)),
        "norm.weight holds numbers that are not finite",
    ),
    (
        "llama",
        lambda folder: change(folder, norm__weight=torch.full((48,), 1e300, dtype=torch.float64)),
        "holds numbers that are not finite",
    ),
    (
        "llama",
        lambda folder: change(folder, layers__0__self_attn__k_proj__weight=torch.ones(48, 48)),
        "k_proj.weight does not have the shape",
    ),
]


@pytest.mark.parametrize(("name", "spoil", "said"), HOSTILE)
def test_a_hostile_folder_is_refused_in_a_line(name, spoil, said, folders, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(folders[name], folder)
    spoil(folder)
    if said is None:  # what is not read does no harm
        from_hf(folder)
        return
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        from_hf(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_hostile_folder_is_one_line_of_every_command(
    folders, train, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folders["gpt2"], "out")
    edit(tmp_path / "out", n_layer=10**9)
    line = (
        "error: out/config.json: n_layer=1000000000 is out of range; it must be at least 1 and at"
        " most 1000\n"
    )
    for main in (evaluate.main, sample.main):
        with pytest.raises(SystemExit) as ended:
            main(["run=out"])
        assert (ended.value.code, capsys.readouterr().err) == (2, line)
    refused = train(
        "model=tiny", "init.hf=out", "schedule.steps=1", "dir=run", "data=stdlib", "batch.length=16"
    )
    assert (refused.returncode, refused.stderr.splitlines()[-1]) == (2, line.strip())


# A model keeps its own word


def test_a_head_that_differs_is_kept_though_the_folder_says_tied(tmp_path, capsys):
    theirs = randomise(
        AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA, tie_word_embeddings=False))
    )
    theirs.save_pretrained(tmp_path)
    edit(tmp_path, tie_word_embeddings=True)
    ours = from_hf(tmp_path)
    assert (
        not ours.config.tied
        and gap(ours, theirs) < 1e-5
        and gap(ours, AutoModelForCausalLM.from_pretrained(tmp_path)) < 1e-5
    )
    assert (
        "note: lm_head.weight differs from model.embed_tokens.weight, though config.json says"
        " tie_word_embeddings=true" in capsys.readouterr().err
    )
    with pytest.raises(
        ValueError, match=r"has another shape than model.tied=true; set model.tied=false"
    ):
        start_from(GPT(replace(ours.config, tied=True)), str(tmp_path), bytes_tokenizer())


@pytest.mark.parametrize("kept", ["both", "head"])
def test_a_head_that_is_the_embedding_is_tied(kept, folders, tmp_path, capsys):
    shutil.copytree(folders["gpt2"], tmp_path / "out")
    table = load_file(tmp_path / "out" / WEIGHTS)["transformer.wte.weight"]
    change(tmp_path / "out", *(["wte.weight"] if kept == "head" else []), lm_head__weight=table)
    ours = from_hf(tmp_path / "out")
    assert (
        ours.config.tied
        and gap(ours, AutoModelForCausalLM.from_pretrained(tmp_path / "out")) < 1e-5
    )
    assert "note:" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "index",
    [
        {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}},
        [],
        "LFS",
    ],
)
def test_a_whole_file_wins_over_a_stale_index(index, folders, tmp_path):
    shutil.copytree(folders["llama"], tmp_path / "out")
    (tmp_path / "out" / INDEX).write_text(json.dumps(index))
    theirs = from_hf(folders["llama"])
    assert all(
        torch.equal(one, other)
        for one, other in zip(
            from_hf(tmp_path / "out").parameters(), theirs.parameters(), strict=True
        )
    )


def test_what_old_versions_kept_beside_the_weights_is_compared(folders, tmp_path, capsys):
    for name, buffer, right in (
        ("gpt2", "h__0__attn__bias", torch.ones(1, 1, 64, 64).tril()),
        (
            "llama",
            "layers__0__self_attn__rotary_emb__inv_freq",
            5e5 ** -(torch.arange(0, 12, 2) / 12),
        ),
    ):
        shutil.copytree(folders[name], tmp_path / name)
        for values, said in (
            (right, ""),
            (
                right + 1,
                f"{buffer.replace('__', '.')} is not what config.json gives, which is used",
            ),
        ):
            change(tmp_path / name, **{buffer: values})
            from_hf(tmp_path / name)
            assert said in (err := capsys.readouterr().err) and bool(said) == bool(err)


@pytest.mark.parametrize("special", [True, False])
def test_a_tokenizer_with_an_id_more_than_the_model_has_rows(
    special, train, tmp_path, cache, capsys, monkeypatch
):
    """A [PAD] that was added without resizing: no text has it where it is special, and transformers
    runs."""
    monkeypatch.chdir(tmp_path)
    FOLDERS["llama2"](tmp_path / "theirs")
    content = json.loads((tmp_path / "theirs/tokenizer.json").read_text())
    rows = len(content["model"]["vocab"])
    content["added_tokens"].append(
        content["added_tokens"][0] | {"id": rows, "content": "[PAD]", "special": special}
    )
    (tmp_path / "theirs/tokenizer.json").write_text(json.dumps(content))
    randomise(
        AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA | {"vocab_size": rows}))
    ).save_pretrained("theirs")
    (tmp_path / "text.txt").write_text(
        "".join(f"def f{i}(x): [PAD] {i}\n---\n" for i in range(100))
    )
    data = ["data=text", "data.path=text.txt", "data.separator=---", f"data.cache={cache}"]
    start = [
        "tokenizer=hf",
        "init.hf=theirs",
        "model.num_layers=2",
        "model.num_heads=4",
        "model.width=48",
        "model.mlp_width=100",
        "model.norm=rmsnorm",
        "model.positions=rope",
        "model.activation=swiglu",
        "model.max_length=64",
        "model.tied=false",
        "schedule.steps=1",
        "batch.length=32",
        "precision=fp32",
        "dir=run",
        "evaluation.tokens=null",
        *data,
    ]
    if not special:
        said = (
            rf"theirs has a model of {rows:,} rows, and a tokenizer of {rows + 1:,} ids; in"
            r" transformers, model.resize_token_embeddings"
        )
        with pytest.raises(SystemExit):
            evaluate.main(["run=theirs", *data])
        assert said in capsys.readouterr().err and said in train(*start).stderr
        return
    evaluate.main(["run=theirs", "length=32", "precision=fp32", *data])
    loss = float(re.search(r"loss (\S+),", capsys.readouterr().out)[1])
    done = train(*start)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])[
        "val/loss"
    ] == pytest.approx(loss, abs=1e-4)
    assert "[PAD]" in AutoTokenizer.from_pretrained("theirs").get_vocab()


def test_start_from_another_scaling_is_refused(tmp_path):
    to_hf(our_model("llama_3.1"), bytes_tokenizer(), tmp_path / "out")
    shape = asdict(OURS["llama_3.1"])
    start_from(GPT(GPTConfig(**shape)), str(tmp_path / "out"), bytes_tokenizer())
    said = (
        "than model.rope_scaling=linear model.rope_low_factor=1.0; set model.rope_scaling=llama3"
        " model.rope_low_factor=0.6"
    )
    with pytest.raises(ValueError, match=re.escape(said)):
        start_from(
            GPT(GPTConfig(**shape | {"rope_scaling": "linear", "rope_low_factor": 1.0})),
            str(tmp_path / "out"),
            bytes_tokenizer(),
        )
    to_hf(our_model("llama"), bytes_tokenizer(), tmp_path / "plain")
    # which nothing reads
    start_from(
        GPT(GPTConfig(**asdict(OURS["llama"]) | {"rope_factor": 8.0})),
        str(tmp_path / "plain"),
        bytes_tokenizer(),
    )


def test_start_from_another_shape_or_vocabulary_is_refused(tmp_path):
    to_hf(our_model("llama_grouped"), bytes_tokenizer(), tmp_path / "out")
    start = {
        "norm": "rmsnorm",
        "positions": "rope",
        "rope_base": 5e5,
        "activation": "swiglu",
        "bias": True,
        "norm_eps": 1e-6,
    }
    # a shorter one, without a table
    same = GPT(
        GPTConfig(
            257, 32, 2, 4, 48, num_kv_heads=2, mlp_width=128, dropout=0.1, z_loss=1e-4, **start
        )
    )
    start_from(same, str(tmp_path / "out"), bytes_tokenizer())
    assert torch.equal(
        same.blocks[1].attention.qkv.weight,
        our_model("llama_grouped").blocks[1].attention.qkv.weight,
    )
    other = GPT(GPTConfig(257, 64, 2, 4, 96, tied=False, **start))
    said = (
        "has another shape than model.width=96 model.num_kv_heads=4 model.mlp_width=256"
        " model.tied=false; set model.width=48 model.num_kv_heads=2 model.mlp_width=128"
        " model.tied=true"
    )
    with pytest.raises(ValueError, match=re.escape(said)):
        start_from(other, str(tmp_path / "out"), bytes_tokenizer())
    # as many entries, and others
    swapped = RankedTokenizer("bytes", bytes_tokenizer().pattern, bytes_tokenizer().ranks[::-1])
    for tokenizer in (train_bpe(["abc abd " * 100], 259), swapped):
        with pytest.raises(
            ValueError,
            match=(
                r"init.hf=.* has a vocabulary of 257 entries, and the tokenizer b\w+ another.*;"
                r" choose the tokenizer"
            ),
        ):
            start_from(same, str(tmp_path / "out"), tokenizer)


# lm-evaluation-harness


@pytest.mark.parametrize("kind", ["bytes", "llama3", "llama2"])
def test_harness_scores_an_export_as_we_do(kind, tmp_path, monkeypatch):
    """`pip install -c constraints.txt lm-eval` makes this run (torchvision, which nothing of it
    needs, must stay out: beside a CPU build of torch it breaks the import of transformers). The
    harness picks the choice of each document whose log-probability is highest."""
    lm_eval, tasks = pytest.importorskip("lm_eval"), pytest.importorskip("lm_eval.tasks")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    tokenizer = (
        bytes_tokenizer() if kind == "bytes" else read_tokenizer(FOLDERS[kind](tmp_path / "theirs"))
    )
    ours = (
        our_model("gpt2")
        if kind == "bytes"
        else randomise(GPT(replace(OURS["llama_3.1"], vocab_size=tokenizer.vocab_size)))
    )
    to_hf(ours, tokenizer, tmp_path / "out")
    documents = [
        {
            "text": f"def f{i}(x):",
            "choices": [" return x", " pass # nothing", f" {i}"],
            "label": i % 3,
        }
        for i in range(20)
    ]
    (tmp_path / "local.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "local.yaml").write_text(
        "task: local\ndataset_path: json\ndataset_kwargs: {data_files: {test:"
        f" {tmp_path}/local.jsonl}}}}\ntest_split: test\noutput_type: multiple_choice\ndoc_to_text:"
        " '{{text}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target:"
        " label\ntarget_delimiter: ''\nmetric_list: [{metric: acc}]\n"
    )
    manager = tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    arguments = {"pretrained": str(tmp_path / "out"), "device": "cpu", "dtype": "float32"}
    found = lm_eval.simple_evaluate(
        "hf",
        model_args=arguments,
        tasks=["local"],
        task_manager=manager,
        bootstrap_iters=0,
        batch_size=4,
    )

    def log_p(text: str, choice: str) -> float:
        ids = torch.tensor([tokenizer.prompt(text + choice)])
        targets = ids[:, 1:].masked_fill(
            torch.arange(1, ids.shape[1]) < len(tokenizer.prompt(text)), -100
        )
        return -ours.loss(ids[:, :-1], targets)[0].item()

    scores = [
        [log_p(document["text"], choice) for choice in document["choices"]]
        for document in documents
    ]
    theirs = [
        [response[0] for response in sample["filtered_resps"]]
        for sample in found["samples"]["local"]
    ]
    torch.testing.assert_close(torch.tensor(theirs), torch.tensor(scores), rtol=0, atol=1e-4)
    right = [
        max(range(3), key=row.__getitem__) == document["label"]
        for row, document in zip(scores, documents, strict=True)
    ]
    assert found["results"]["local"]["acc,none"] == pytest.approx(sum(right) / 20)
