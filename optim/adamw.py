"""The base optimiser: a plain torch optimiser that never hears of sharpness, and its parameter groups."""

from torch import Tensor, nn
from torch.optim import AdamW

from conf.schema import OptimConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices (embeddings among them), which decay, and vectors (norms, biases), which do not. Every trainable
    parameter is in exactly one of them, tied ones once. Each group has a `name` and the `names` of its parameters."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [(name, p) for name, p in trainable if p.ndim >= 2]
    vectors = [(name, p) for name, p in trainable if p.ndim < 2]
    groups = [("matrices", weight_decay, matrices), ("vectors", 0.0, vectors)]
    return [
        {"name": group, "weight_decay": decay, "names": [name for name, _ in members], "params": [p for _, p in members]}
        for group, decay, members in groups
        if members
    ]


def build_optimizer(model: nn.Module, config: OptimConfig) -> AdamW:
    """Torch's fused AdamW: m = b1 m + (1-b1) g, v = b2 v + (1-b2) g^2, w -= lr (m^ / (sqrt(v^) + eps) + decay w)."""
    groups = parameter_groups(model, config.weight_decay)
    return AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def describe_groups(optimizer: AdamW) -> str:
    """One line that says which group holds how many parameters and how they decay."""
    parts = (f"{g['name']} {len(g['params'])} tensors, {sum(p.numel() for p in g['params']):,} numbers, decay {g['weight_decay']:g}"
             for g in optimizer.param_groups)  # fmt: skip
    return "; ".join(parts)


def state_tensors(model: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """The optimiser's state as tensors by `<parameter name>.<key>`, in the form that a checkpoint keeps."""
    return {f"{name}.{key}": value for name, p in model.named_parameters() for key, value in optimizer.state.get(p, {}).items()}


def load_state_tensors(model: nn.Module, optimizer: AdamW, tensors: dict[str, Tensor]) -> None:
    """The inverse of `state_tensors`. Raises KeyError where the tensors name a parameter that the model does not have."""
    parameters = dict(model.named_parameters())
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition(".")
        device = "cpu" if key == "step" and not parameters[name].is_cuda else parameters[name].device
        optimizer.state[parameters[name]][key] = value.to(device)
