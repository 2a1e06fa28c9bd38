"""nanoGPT's CPU Shakespeare settings, by train.py and by a plain loop on the same batches.

    python tests/benchmarks/shakespeare.py --data .../tinyshakespeare/input.txt

The plain loop is torch's unfused AdamW around transformers' GPT-2 with the biases held at zero, in
fp32, from the same first weights: nothing of ours but the loader. Both losses are over the full
validation set."""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F

from data import Loader, Validation, prepare
from launch.config import compose
from launch.plan.plan import make_plan
from model import GPT
from model.hf_config import to_config
from model.hf_formats import FORMATS
from model.hf_weights import to_tensors


def plain_loop(overrides: list[str]) -> float:
    """Full validation loss of the plain loop."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = compose(overrides)
    corpus, batch = prepare(config.data, config.tokenizer), config.batch
    shape = make_plan(config).model
    model = GPT2LMHeadModel(GPT2Config(**to_config(shape, "gpt2")))
    model.load_state_dict(to_tensors(GPT(shape, config.seed), FORMATS["gpt2"]), strict=False)
    weights = [
        parameter.requires_grad_(not name.endswith("bias"))
        for name, parameter in model.named_parameters()
    ]
    matrices, vectors = (
        [p for p in weights if p.requires_grad and p.ndim > 1],
        [p for p in weights if p.requires_grad and p.ndim == 1],
    )
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), foreach=False, fused=False)
    loader = Loader(corpus.train, None, batch.length, batch.sequences, config.seed)
    for step in range(2000):
        rate = (
            step / 100 if step < 100 else 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 100) / 1900))
        )
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * rate
        tokens, targets = loader.batch(step)
        F.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    held_out = Validation(next(iter(corpus.validation.values())), batch.length, corpus.tokenizer)
    with torch.no_grad():
        total = sum(
            F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten(), reduction="sum").item()
            for x, y in held_out.batches(64)
        )
    return total / held_out.num_tokens


def main() -> None:
    """Prints both losses."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            "experiment=shakespeare_char_cpu",
            f"data.path={parser.parse_args().data}",
            f"data.cache={folder}/cache",
            "tracking=none",
        ]
        root = Path(__file__).parents[2]
        subprocess.run(
            [sys.executable, "train.py", *overrides, f"dir={folder}/run"],
            cwd=root,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        ours = json.loads(Path(folder, "run", "summary.json").read_text())["val/loss"]
        plain = plain_loop(overrides)
    print(
        f"{date.today()}, torch {torch.__version__}: train.py {ours:.4f}, plain loop {plain:.4f},"
        f" difference {ours - plain:+.4f} nats per character"
    )


if __name__ == "__main__":
    main()
