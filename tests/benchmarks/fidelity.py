"""What bf16 leaves of a rule at every radius, on trained models: the table of
tests/benchmarks/results/precision.md.

    python tests/benchmarks/fidelity.py RUN... [--radii 0.005 0.02 ...] [--sequences 16]

RUN is a run folder of train.py. On the first batch of that run, at its last weights without
dropout, each radius gives the norm, cosine and component along of the realised move, and the
fidelity of SAM, J(t~)^T r(t~) - g, and of Functional-SAM, J(t~)^T r(t) - g: the cosine of that
change of the gradient in bf16 with the same in IEEE fp32."""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from data import Loader, prepare
from launch.run.folder import load_config
from model import load
from model.device import autocast
from optim import Gradient, SharpnessAware
from optim.rule.conditions import ieee_fp32

RADII = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5)
CPU = torch.device("cpu")


def first_batch(run: Path, sequences: int) -> tuple[Tensor, Tensor]:
    """Returns the first sequences of the first batch of a run."""
    settings = load_config(run)
    corpus = prepare(settings.data, settings.tokenizer)
    batch = settings.batch
    loader = Loader(corpus.train, corpus.weights, batch.length, batch.sequences, settings.seed)
    tokens_BxT, targets_BxT = loader.batch(0)
    return tokens_BxT[:sequences], targets_BxT[:sequences]


def gradient_of(
    rule: Gradient, batch: tuple[Tensor, Tensor], exact: bool
) -> tuple[Tensor, dict[str, float]]:
    """Returns what a rule leaves in p.grad, as one vector, and what it logs; in bf16, or `exact`,
    in IEEE fp32."""
    rule.module.zero_grad()
    with ieee_fp32(CPU) if exact else autocast(CPU, torch.bfloat16):
        metrics = rule.gradient([batch]).metrics
    return (
        torch.cat(
            [p.grad.double().flatten() for p in rule.parameters.values() if p.grad is not None]
        ),
        metrics,
    )


def measure(run: Path, radii: list[float], sequences: int) -> None:
    """Prints the table of a run."""
    model, batch = load(run).eval(), first_batch(run, sequences)
    optimizer = torch.optim.AdamW(model.parameters())
    plain = Gradient(model)
    g, exact_g = (gradient_of(plain, batch, exact)[0] for exact in (False, True))
    tokens = batch[1].numel()
    print(
        f"\n{model.num_parameters():,} parameters, {len(batch[0])} sequences, {tokens:,} tokens,"
        " cosine of g in bf16 with g in fp32 ",
        end="",
    )
    print(f"{torch.cosine_similarity(g, exact_g, dim=0).item():.4f}\n")
    print(
        "| rho | realised cosine | realised norm / rho | realised along | fidelity of SAM |"
        " fidelity of Functional-SAM |\n|---|---|---|---|---|---|"
    )
    for rho in radii:
        cells = [f"{rho:g}"]
        for path in ("full", "functional"):
            rule = SharpnessAware(model, optimizer, rho=rho, path=path, cotangent="store")
            ours, logged = gradient_of(rule, batch, exact=False)
            exact, _ = gradient_of(rule, batch, exact=True)
            if path == "full":
                cells.append(f"{logged['sharpness/realised_cosine']:.2f}")
                cells.append(f"{logged['sharpness/realised_radius'] / rho:.2f}")
                cells.append(f"{logged['sharpness/realised_along']:.3f}")
            cells.append(f"{torch.cosine_similarity(ours - g, exact - exact_g, dim=0).item():.3f}")
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Measures every run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--radii", type=float, nargs="+", default=RADII)
    parser.add_argument("--sequences", type=int, default=16)
    options = parser.parse_args()
    for run in options.runs:
        measure(run, options.radii, options.sequences)


if __name__ == "__main__":
    main()
