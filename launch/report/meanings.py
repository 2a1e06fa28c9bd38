"""The meanings of the figures of a run's rows, and the titles of their axes."""

import re

# Name of a figure: the title of its axis, and what it means.
MEANINGS = {
    "optim/lr": ("learning rate", "Learning rate."),
    "sharpness/gap": (
        "moved minus clean loss (nats)",
        "Loss at the moved weights minus the clean loss (nats per token).",
    ),
    "sharpness/perturbed_loss": (
        "loss at moved weights (nats)",
        "Loss at the moved weights (nats per token).",
    ),
    "sharpness/clean_loss": (
        "loss at clean weights (nats)",
        (
            "Loss at the weights as they are, of rules whose own pass does not tell it (nats per"
            " token)."
        ),
    ),
    "sharpness/curvature": (
        "curvature along the ascent",
        (
            "Curvature along the ascent: the slope there minus the slope here, over the distance"
            " (nats per token per unit of weight, squared)."
        ),
    ),
    "sharpness/slope": (
        "slope along the ascent",
        (
            "Slope of the loss along the ascent, at the weights as they are (nats per token per"
            " unit of weight)."
        ),
    ),
    "sharpness/rule_slope": (
        "slope at the moved weights",
        (
            "Slope along the ascent by the rule's own gradient, at the moved weights (nats per"
            " token per unit of weight)."
        ),
    ),
    "sharpness/gradient_norm": (
        "norm of the clean gradient",
        (
            "Norm of the clean gradient, along which the weights move (nats per token per unit of"
            " weight)."
        ),
    ),
    "sharpness/rule_norm": (
        "norm of the rule's gradient",
        (
            "Norm of the gradient that the rule hands on, before clipping (nats per token per unit"
            " of weight)."
        ),
    ),
    "sharpness/cosine": (
        "cosine with the plain gradient",
        "Cosine of the rule's gradient and the plain one.",
    ),
    "sharpness/rho": (
        "radius asked for",
        (
            "Radius that the schedule asks for, in the norm of the rule's metric (units of weight"
            " where that is euclidean)."
        ),
    ),
    "sharpness/realised_radius": (
        "realised radius",
        "Length of what the compute precision left of the move (units of weight).",
    ),
    "sharpness/realised_cosine": (
        "cosine of the realised move",
        (
            "Cosine of the move and of what the compute precision left of it: the rest is noise at"
            " right angles, which hardly excites curvature."
        ),
    ),
    "sharpness/realised_along": (
        "realised move along asked one",
        (
            "Part of the realised move along the intended one, as a share of the radius: 1 where"
            " the compute precision follows it."
        ),
    ),
    "sharpness/fidelity": (
        "fidelity to fp32 (cosine)",
        (
            "Cosine of the gradient's change by the rule, in the run's precision, with the same in"
            " fp32."
        ),
    ),
    "sharpness/share_embedding": (
        "share of the embeddings",
        "Share of the move's squared length in the embeddings.",
    ),
    "sharpness/share_body": (
        "share of blocks and norms",
        "Share of the move's squared length in the blocks and norms.",
    ),
    "sharpness/share_head": (
        "share of the head",
        "Share of the move's squared length in the head.",
    ),
    "sharpness/delta_func": (
        "norm of the functional part",
        (
            "Norm of the functional part of SAM's change of the gradient (nats per token per unit"
            " of weight)."
        ),
    ),
    "sharpness/delta_logit": (
        "norm of the logit part",
        (
            "Norm of the logit part of SAM's change of the gradient (nats per token per unit of"
            " weight)."
        ),
    ),
    "sharpness/cosine_func_logit": (
        "cosine of both parts",
        "Cosine of the functional and the logit part.",
    ),
    "sharpness/cosine_func_gradient": (
        "cosine, functional and gradient",
        "Cosine of the functional part and the plain gradient.",
    ),
    "sharpness/cosine_logit_gradient": (
        "cosine, logit part and gradient",
        "Cosine of the logit part and the plain gradient.",
    ),
    "grad/norm": (
        "norm of the gradient",
        "Norm of the gradient before clipping (nats per token per unit of weight).",
    ),
    "logits/entropy": ("entropy of predictions (nats)", "Entropy of the predictions (nats)."),
    "logits/largest": ("largest logit", "Largest logit."),
    "logits/log_normaliser": ("log-normaliser (nats)", "Log-normaliser of the logits (nats)."),
    "perf/tokens_per_second": (
        "tokens per second",
        "Tokens per second, without evaluations and checkpoints.",
    ),
}
# Only a run that stands alone has charts of these.
LONE = (
    "optim/lr",
    "logits/entropy",
    "logits/largest",
    "logits/log_normaliser",
)


def title(name: str) -> str:
    """Returns the title of a figure's axis."""
    return described(name)[0]


def meaning(name: str) -> str:
    """Returns the meaning of a figure, in a sentence."""
    return described(name)[1]


def described(name: str) -> tuple[str, str]:
    """Returns (title of the axis, meaning) of a figure. One that a method of the user's own logs is
    not in MEANINGS, and its name stands for both."""
    return MEANINGS.get(name, (re.sub("[/_]", " ", name), f"{name}."))
