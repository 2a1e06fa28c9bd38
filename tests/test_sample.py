"""Sampling: the cache changes no token, and each setting keeps what it says."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from data.tokenizer import bytes_tokenizer
from model import GPT, GPTConfig, load, sample
from model.export import to_hf
from model.hf import from_hf
from model.sample import Sampling, decode_stream, draw_token, generate
from tests.runs import ROOT

MODEL = GPT(GPTConfig(50, 16, 2, 2, 16, positions="rope", norm="rmsnorm"), seed=1)


GREEDY = Sampling(temperature=0)


def take(num_tokens: int = 12, use_cache: bool = True, **settings) -> list[int]:
    return list(generate(MODEL, [3, 7], num_tokens, Sampling(**settings), use_cache))


def test_temperature_zero_takes_the_likeliest_of_the_full_forward():
    tokens = [3, 7]
    for _ in range(12):
        tokens.append(int(MODEL(torch.tensor([tokens]))[0, -1].argmax()))
    assert take(temperature=0) == tokens[2:]


def test_beyond_the_context_the_last_half_of_it_is_read_anew():
    prompt, length = [3, 7], MODEL.config.max_length
    context, expected = list(prompt), []
    for _ in range(40):
        if len(context) > length:
            context = context[-(length // 2 + 1) :]
        expected.append(int(MODEL(torch.tensor([context]))[0, -1].argmax()))
        context.append(expected[-1])
    assert take(40, temperature=0) == expected


def test_of_a_prompt_longer_than_the_context_its_end_is_read():
    prompt = torch.randint(0, 50, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    assert (
        list(generate(MODEL, prompt, 20))
        == list(generate(MODEL, prompt[-16:], 20))
        != list(generate(MODEL, prompt[-15:], 20))
    )


@pytest.mark.parametrize("num_tokens", [12, 60])  # within the context, and far beyond it
def test_one_seed_gives_one_text(num_tokens):
    assert take(num_tokens, seed=5) == take(num_tokens, seed=5) != take(num_tokens, seed=6)
    assert len(take(num_tokens)) == num_tokens


def test_the_cache_changes_no_token():
    assert take(seed=5) == take(seed=5, use_cache=False)


def test_the_narrowest_settings_are_greedy():
    assert take(top_k=1) == take(top_p=1e-9) == take(temperature=0)


def test_dropout_is_off_whatever_the_mode_of_the_model():
    model = GPT(GPTConfig(50, 16, 2, 2, 16, dropout=0.5), seed=1)
    assert model.training
    drawn = list(generate(model, [3, 7], 12, GREEDY))
    assert model.training and drawn == list(generate(model.eval(), [3, 7], 12, GREEDY))


def test_what_is_loaded_is_in_evaluation_mode(reference, tmp_path):
    """The run has dropout, and its weights cost less without it."""
    model = load(reference)
    assert not model.training and model.config.dropout > 0
    tokens = torch.arange(60)[None]
    assert torch.equal(model(tokens), load(reference).eval()(tokens))
    for format in ("gpt2", "plain"):
        to_hf(model, bytes_tokenizer(), tmp_path / format, format)
    assert not from_hf(tmp_path / "gpt2").training


@pytest.mark.parametrize("temperature", [1e-38, 1e-45, 1e-300, 5e-324])
def test_the_lowest_temperatures_are_greedy(temperature):
    assert take(temperature=temperature) == take(temperature=0)
    logits, sampling = torch.tensor([0.0, 3e38, -3e38]), Sampling(temperature, 2, 0.5)
    assert draw_token(logits, sampling, torch.Generator()) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_said_to_be(temperature):
    with pytest.raises(ValueError, match="logits are not finite"):
        draw_token(torch.tensor([0.0, float("nan")]), Sampling(temperature), torch.Generator())


def draws(logits: torch.Tensor, number: int = 4000, **settings) -> torch.Tensor:
    sampling = Sampling(**settings)
    generator = torch.Generator().manual_seed(0)
    found = [draw_token(logits, sampling, generator) for _ in range(number)]
    return torch.bincount(torch.tensor(found), minlength=len(logits)) / number


def test_draws_follow_the_softmax_at_the_temperature():
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0])
    for temperature in (0.5, 1.0, 2.0):
        expected = (logits / temperature).softmax(0)
        assert (draws(logits, temperature=temperature) - expected).abs().max() < 4 * (
            0.25 / 4000
        ) ** 0.5


def test_top_k_and_top_p_keep_the_likeliest():
    logits = torch.tensor([0.5, 0.05, 0.3, 0.15]).log()
    assert draws(logits, 500, top_k=2).nonzero().flatten().tolist() == [0, 2]
    assert draws(logits, 500, top_p=0.79).nonzero().flatten().tolist() == [0, 2]
    assert draws(logits, 500, top_p=0.81).nonzero().flatten().tolist() == [0, 2, 3]
    assert draws(logits, 500, top_p=0.49).nonzero().flatten().tolist() == [0]


@pytest.mark.parametrize(
    "settings", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_k": 0}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="need temperature"):
        take(**settings)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt is empty"):
        next(generate(MODEL, [], 1))


def test_a_character_waits_for_its_last_byte():
    content = "naïve €\U0001f600".encode()
    parts = list(decode_stream(iter(content), lambda ids: bytes(ids)))
    assert "".join(parts) == content.decode()
    assert list(itertools.accumulate(parts))[3] == "na" + "ï"
    assert "".join(decode_stream(iter(content[:-1]), lambda ids: bytes(ids))).endswith("€\ufffd")


# The command


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A model of bytes that was never trained: it writes any of them."""
    model, folder = (
        GPT(GPTConfig(257, 8, 1, 2, 16, tied=False), seed=1),
        tmp_path_factory.mktemp("sampled") / "export",
    )
    to_hf(model, bytes_tokenizer(), folder, "plain")
    return folder


def command(export, *options: str, **keys) -> subprocess.Popen:
    arguments = [
        sys.executable,
        "-m",
        "model.sample",
        f"run={export}",
        "device=cpu",
        "precision=fp32",
        *options,
    ]
    return subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **keys
    )


def test_a_closed_pipe_ends_it_quietly(export):
    process = command(export, "tokens=3000", "prompt=abc")
    assert process.stdout.read(3) == b"abc"
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 0)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_that_is_not_utf_8_sees_other_characters(encoding, export):
    process = command(
        export,
        "tokens=40",
        "prompt=naïve €\U0001f600: ",
        env=os.environ | {"PYTHONIOENCODING": encoding},
    )
    out, err = process.communicate()
    assert (process.returncode, err) == (0, b"")
    assert out.decode(encoding).startswith(
        "naïve €\U0001f600: ".encode(encoding, "backslashreplace").decode(encoding)
    )


@pytest.mark.parametrize(
    "prompt", ["echo ${HOME}/bin", "${oc.env:HOME}", "a=b, [c] {d} 'e' \"f\"", "null", "1e5", ""]
)
def test_a_prompt_is_text(prompt, export, capsys):
    sample.main([f"run={export}", f"prompt={prompt}", "tokens=1", "device=cpu"])
    assert capsys.readouterr().out.startswith(prompt)
