"""What a config.json says is read as transformers reads it, or refused: keys under two names, in
two places, or of something that a GPT does not compute."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.tokenizer import bytes_tokenizer
from launch import evaluate
from model import sample
from model.hf import from_hf, start_from

transformers = pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM  # noqa: E402

from tests.test_hf import SCALED, WEIGHTS, edit, gap, our_model, their_model  # noqa: E402

GENERAL = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
DEFAULT = {"rope_type": "default", "rope_theta": 500.0}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}

# Each case has the number of heads, the kind of scaling or another value that tells which of two
# statements was read.
READ: list[tuple[str, dict[str, Any], str, Any]] = [
    # A general name beside the format's own.
    ("gpt2", {"num_attention_heads": 2}, "num_heads", 2),
    # Keys of rotary positions that are of something else on top.
    (
        "llama",
        {"type": "linear", "factor": 4.0, "rope_parameters": None},
        "rope_scaling",
        "none",
    ),
    (
        "llama",
        {"rope_type": "linear", "factor": 4.0, "rope_parameters": None},
        "rope_scaling",
        "none",
    ),
    ("llama_linear", {"factor": 2.0}, "rope_factor", 4.0),
    ("llama_3.1", {"low_freq_factor": 0.1}, "rope_low_factor", 0.6),
    # The one that counts on top, before the one within.
    ("llama_3.1", {"original_max_position_embeddings": 16}, "rope_original_length", 16),
    (
        "llama",
        {
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                key: value
                for key, value in SCALED.items()
                if key != "original_max_position_embeddings"
            },
        },
        "rope_original_length",
        32,
    ),
    # rope_theta within, before the one on top, and on top where there is none within.
    ("llama", {"rope_theta": 1e6, "rope_parameters": DEFAULT}, "rope_base", 500.0),
    (
        "llama",
        {"rope_theta": 500, "rope_parameters": {"rope_type": "default"}},
        "rope_base",
        500.0,
    ),
    ("llama", {"rope_scaling": {}, "rope_parameters": LINEAR}, "rope_scaling", "linear"),
    # The newer name of the kind, before the older one.
    (
        "llama",
        {"rope_parameters": DEFAULT | {"type": "linear", "factor": 4.0}},
        "rope_scaling",
        "none",
    ),
    ("llama", {"rope_parameters": LINEAR | {"type": "default"}}, "rope_scaling", "linear"),
    # What a Llama does not look at.
    ("llama", {"sliding_window": 8, "logits_scaling": 2.0}, "positions", "rope"),
]


@pytest.mark.parametrize(("name", "changes", "key", "value"), READ)
def test_of_two_statements_the_one_that_transformers_takes_is_read(
    name, changes, key, value, tmp_path
):
    their_model(name).save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    ours = from_hf(tmp_path)
    assert getattr(ours.config, key) == value
    assert gap(ours, AutoModelForCausalLM.from_pretrained(tmp_path)) < 1e-5


def test_a_gpt2_under_general_names_is_read(tmp_path):
    theirs = their_model("gpt2")
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for general, own in GENERAL.items():
        config[general] = config.pop(own)
    path.write_text(json.dumps(config))
    assert gap(from_hf(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"is_causal": False}, "is_causal=false is not what a GPT computes (true)"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            'quantization_config={"quant_method": "gptq", "bits": 4} would quantise the weights',
        ),
    ],
)
def test_what_would_change_the_logits_is_refused(name, changes, said, tmp_path):
    their_model(name).save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/config.json: {said}")):
        from_hf(tmp_path)


# Weights that are there, and not as a whole model


def wrapped(folder: Path, prefix: str) -> None:
    """Puts a prefix before every name."""
    tensors = load_file(folder / WEIGHTS)
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, folder / WEIGHTS)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_the_weights_of_a_wrapper_are_called_so(name, prefix, tmp_path):
    their_model(name).save_pretrained(tmp_path)
    wrapped(tmp_path, prefix)
    said = rf"is missing, and {prefix}\S+ is there: those are the weights of a wrapper"
    with pytest.raises(ValueError, match=said):
        from_hf(tmp_path)


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_is_called_so(whole, tmp_path, capsys):
    """Beside a model transformers applies it, alone it has no config.json."""
    their_model("llama").save_pretrained(tmp_path)
    if not whole:
        (tmp_path / "config.json").unlink()
        (tmp_path / WEIGHTS).unlink()
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match=r"adapter_config.json: .* an adapter, .*merge_and_unload"):
        start_from(our_model("llama"), str(tmp_path), bytes_tokenizer())
    for main in (evaluate.main, sample.main):
        with pytest.raises(SystemExit):
            main([f"run={tmp_path}"])
        assert "adapter_config.json: the folder holds an adapter" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("left", "said"),
    [
        (
            "model-00001-of-00002.safetensors",
            "has files of weights such as model-00001-of-00002.safetensors, and no"
            " model.safetensors.index.json",
        ),
        ("model.fp16.safetensors", "has model.fp16.safetensors, and no model.safetensors"),
        ("llama.gguf", "has llama.gguf, and no model.safetensors"),
    ],
)
def test_other_weights_than_a_whole_model_are_named(left, said, tmp_path):
    their_model("llama").save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / left)
    with pytest.raises(ValueError, match=re.escape(said)):
        from_hf(tmp_path)


def test_a_missing_head_is_not_taken_for_a_tied_one(tmp_path):
    """Transformers draws one: the folder of a tied Llama must say that it is tied."""
    their_model("llama_grouped").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"lm_head.weight is missing, .*tie_word_embeddings=true"):
        from_hf(tmp_path)


@pytest.mark.parametrize("kind", [torch.float16, torch.float64])
def test_other_widths_of_floats_are_read(kind, tmp_path):
    their_model("llama").to(kind).save_pretrained(tmp_path)
    assert gap(from_hf(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path).float()) < 1e-5
