"""Text from a trained model: python -m model.sample run=DIR prompt="def " tokens=200
temperature=0.8 top_k=200 top_p=1.0 seed=0"""

import codecs
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import MISSING
from torch import Tensor

from conf.key import STEPS, key
from model.gpt import GPT, KeyValueCache, evaluating
from model.trained import open_trained


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn from softmax(logits / temperature).

    Raises ValueError for a setting out of range."""

    temperature: float = 1.0  # 0 takes the likeliest token
    top_k: int | None = None  # keeps the k likeliest
    top_p: float = 1.0  # keeps the fewest whose probability reaches p
    seed: int = 0

    def __post_init__(self) -> None:
        is_k_valid = self.top_k is None or self.top_k >= 1
        # Written so that nan, which no comparison holds for, is refused.
        if not self.temperature >= 0 or not 0 < self.top_p <= 1 or not is_k_valid:
            raise ValueError(
                f"temperature={self.temperature} top_k={self.top_k} top_p={self.top_p}: need"
                " temperature >= 0, top_k >= 1, 0 < top_p <= 1"
            )


FROM_SOFTMAX = Sampling()


@torch.no_grad()
def generate(
    model: GPT,
    prompt: list[int],
    num_tokens: int,
    sampling: Sampling = FROM_SOFTMAX,
    use_cache: bool = True,
) -> Iterator[int]:
    """Yields `num_tokens` token ids that continue the prompt, one by one.

    Dropout is off, whatever mode the model is in. Each token reads the keys and values of those
    before it from a cache; a full context's last half is read anew, as a prompt.

    Args:
        model: on any device
        prompt: token ids, at least one; of a long one the end is read
        num_tokens: how many are drawn
        sampling: how they are drawn; by default from the softmax as it is
        use_cache: whether keys and values are kept, or computed again for each token

    Raises:
        ValueError: the prompt is empty, or the model's logits are not finite
    """
    if not prompt:
        raise ValueError("prompt is empty; give at least one token")
    device, length = model.embedding.weight.device, model.config.max_length
    generator = torch.Generator().manual_seed(sampling.seed)
    tokens = list(prompt)
    caches: list[KeyValueCache] | None = None
    for _ in range(num_tokens):
        context = tokens[-1:]
        if caches is None or caches[0].length >= length:
            # At first all that fits; once the context is full, its last half.
            context = tokens[-length:] if caches is None else tokens[-(length // 2 + 1) :]
            caches = [KeyValueCache() for _ in model.blocks]
        with evaluating(model):
            logits_V = model(torch.tensor([context], device=device), caches)[0, -1].float().cpu()
        if not use_cache:
            caches = None
        tokens.append(draw_token(logits_V, sampling, generator))
        yield tokens[-1]


def draw_token(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draws one token id. Raises ValueError for logits that are not finite."""
    if not logits_V.isfinite().all():
        raise ValueError(
            "the model's logits are not finite: its weights are damaged or its training diverged;"
            " choose another step of the run"
        )
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    # Sorted, so that top_k is a slice and top_p a running sum.
    logits_V, ids_V = logits_V.sort(descending=True)
    # From the largest down and in fp64, so that no temperature makes a number that is not one.
    below_largest_K = logits_V[: sampling.top_k].double() - logits_V[0]
    p_K = below_largest_K.div(sampling.temperature).softmax(0).float()
    # The likeliest always stays: nothing comes before it.
    p_K[p_K.cumsum(0) - p_K >= sampling.top_p] = 0.0
    return int(ids_V[torch.multinomial(p_K, 1, generator=generator)])


@dataclass
class Options:
    """Continues a prompt with a trained model, and streams the text.

    python -m model.sample run=runs/NAME prompt='def '
    python -m model.sample run=runs/NAME tokens=50 temperature=0
    """

    run: str = key(MISSING, "run folder, export or Hugging Face folder", path=True)
    step: int | None = key(None, "step of the checkpoint; default the newest", low=0, high=STEPS)
    prompt: str = key(
        "", "text to continue; default the start of a document", text=True, empty=True
    )
    tokens: int = key(256, "tokens to generate", low=1, high=STEPS)
    temperature: float = key(0.8, "0 takes the likeliest token", low=0.0, high=1e6)
    top_k: int | None = key(200, "draw among the k likeliest tokens", low=1, high=STEPS)
    top_p: float = key(
        1.0, "draw among the fewest tokens whose probability reaches p", above=0.0, high=1.0
    )
    seed: int = key(0, "seed of the draws", low=0, high=2**63 - 1)
    device: str = key("auto", "auto: CUDA where there is one", choices=("auto", "cpu", "cuda"))
    precision: str = key("auto", "as in training", choices=("auto", "bf16", "fp32"))


def main(arguments: list[str]) -> None:
    """Streams a continuation to stdout."""
    from conf.cli import parse, user_errors
    from model.device import autocast, choose_device, choose_precision

    with user_errors():
        options, _ = parse(Options, arguments)
        device = choose_device(options.device)
        _, model, tokenizer, _ = open_trained(Path(options.run), options.step)
        model.to(device)
        prompt = tokenizer.prompt(options.prompt)
        sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
        print(options.prompt, end="", flush=True)
        with autocast(device, choose_precision(options.precision, device)):
            tokens = generate(model, prompt, options.tokens, sampling)
            for text in decode_stream(tokens, tokenizer.decode_bytes):
                print(text, end="", flush=True)
        print()


def decode_stream(
    tokens: Iterator[int], decode_bytes: Callable[[list[int]], bytes]
) -> Iterator[str]:
    """Yields the text of tokens as it becomes certain: a character cut between two tokens waits for
    its last byte."""
    # The decoder keeps the bytes of a character that is not complete yet.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        yield decoder.decode(decode_bytes([token]))
    yield decoder.decode(b"", final=True)


if __name__ == "__main__":
    main(sys.argv[1:])
