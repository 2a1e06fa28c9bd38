"""Evaluation: the loss of every counted target, held against a plain loop over the text."""

import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from data import Validation
from data.hf_folder import read_tokenizer
from data.shards import Shard, Tokens, write_shard
from launch.evaluate import evaluate
from model import GPT, GPTConfig
from tests.hf_folders import llama2

TEXTS = ["def f(x):\n    return x\n", "a, b = 1, 2  # é", "import os\n\nprint(os.name)\n" * 3]
T = 13


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One that puts <s> before a document, which nobody has to predict."""
    return read_tokenizer(llama2(tmp_path_factory.mktemp("llama2")))


def tokens_of(texts: list[str], tokenizer, path: Path) -> Tokens:
    """The documents as one shard."""
    documents = [tokenizer.document(text) for text in texts]
    starts = [sum(map(len, documents[:index])) for index in range(len(documents))]
    write_shard(
        path,
        torch.cat([torch.from_numpy(ids.astype("int64")) for ids in documents]).numpy(),
        starts,
        0,
        tokenizer,
    )
    return Tokens([Shard.open(path, tokenizer)])


def model_of(tokenizer, **shape) -> GPT:
    return GPT(GPTConfig(tokenizer.vocab_size, 32, 1, 2, 16, **shape)).double()


@torch.no_grad()
def plain_loop(model: GPT, tokenizer, texts: list[str]) -> tuple[float, int]:
    """The summed loss in nats, and the number of targets that count: one token after the other, in
    windows of T."""
    ids = [i for text in texts for i in tokenizer.document(text).tolist()]
    total, count = 0.0, 0
    for first in range(0, len(ids) - 1, T):
        window = ids[first : first + T + 1]
        log_p = model.eval()(torch.tensor([window[:-1]]))[0].log_softmax(-1)
        for place, target in enumerate(window[1:]):
            if target not in tokenizer.bos:
                total -= log_p[place, target].item()
                count += 1
    return total, count


@pytest.mark.parametrize("sequences", [1, 3, 100])
def test_loss_and_bits_are_those_of_a_plain_loop(sequences, tokenizer, tmp_path):
    """The last window is a part of one, and what begins a document is not counted; bits are over
    the bytes of the text itself."""
    model = model_of(tokenizer, dropout=0.3, z_loss=0.1)
    sets = {"one": TEXTS, "two": TEXTS[1:]}
    validation = {
        name: Validation(tokens_of(texts, tokenizer, tmp_path / name), T, tokenizer)
        for name, texts in sets.items()
    }
    assert (len(validation["one"].source) - 1) % T
    row = evaluate(model, validation, sequences, nullcontext)
    assert model.training
    for prefix, texts in (("val/", TEXTS), ("val/two/", TEXTS[1:])):
        total, count = plain_loop(model, tokenizer, texts)
        num_bytes = sum(len(text.encode()) for text in texts)
        assert count == sum(len(tokenizer.encode(text)) + 1 for text in texts)
        assert row[prefix + "loss"] == pytest.approx(total / count, rel=1e-12)
        assert row[prefix + "perplexity"] == pytest.approx(math.exp(total / count), rel=1e-12)
        assert row[prefix + "bits_per_byte"] == pytest.approx(
            total / math.log(2) / num_bytes, rel=1e-12
        )


def test_stopped_in_the_middle_it_finds_nothing_and_leaves_the_mode(tokenizer, tmp_path):
    model, asked = model_of(tokenizer), []
    validation = Validation(tokens_of(TEXTS, tokenizer, tmp_path / "one"), T, tokenizer)
    assert (
        evaluate(
            model,
            {"one": validation},
            1,
            nullcontext,
            lambda: bool(asked.append(0) or len(asked) > 2),
        )
        is None
    )
    assert len(asked) == 3 and model.training
