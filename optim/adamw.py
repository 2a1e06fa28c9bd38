"""The base optimiser: a plain torch optimiser that never hears of sharpness, and its parameter
groups."""

from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, AdamW, Muon, Optimizer

from conf.rule import OptimConfig
from model.sharding import shard_of, sharded_as


def parameter_groups(model: nn.Module, weight_decay: float, split: bool = False) -> list[dict]:
    """Returns two groups: matrices (embeddings among them), which decay, and vectors (norms,
    biases), which do not. With `split` the matrices of the body come first, in a group of their
    own. Every trainable parameter is in exactly one group, tied ones once. Each group has a `name`
    and the `names` of its parameters."""
    # Embeddings, positions and the head are matrices by shape and tables by use: Muon's steps are
    # for maps between hidden states, so `split` leaves tables out of the body.
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    tables = ("embedding.", "positions.", "head.")
    matrices = [
        (name, p) for name, p in trainable if p.ndim >= 2 and (not split or name.startswith(tables))
    ]
    body = [
        (name, p) for name, p in trainable if p.ndim >= 2 and split and not name.startswith(tables)
    ]
    vectors = [(name, p) for name, p in trainable if p.ndim < 2]
    groups = [
        ("body", weight_decay, body),
        ("matrices", weight_decay, matrices),
        ("vectors", 0.0, vectors),
    ]
    return [
        {
            "name": group,
            "weight_decay": decay,
            "names": [name for name, _ in members],
            "params": [p for _, p in members],
        }
        for group, decay, members in groups
        if members
    ]


class MuonAndAdamW(Optimizer):
    """Two torch optimisers that look like one: Muon for some groups, AdamW for the rest. Their
    states are one dict, of disjoint keys."""

    def __init__(self, muon: Muon, adamw: AdamW) -> None:
        # One dict of states and one list of groups, which `step` of either part reads: schedules,
        # rules and checkpoints see an optimiser like any other.
        self.parts = (muon, adamw)
        self.defaults = {}
        self.state = adamw.state
        self.param_groups = [*muon.param_groups, *adamw.param_groups]
        muon.state = adamw.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Takes one step of both."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of both."""
        for part in self.parts:
            part.zero_grad(set_to_none)


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """Returns the base optimiser over `parameter_groups`.

    adamw   torch's fused: m = b1 m + (1-b1) g, v = b2 v + (1-b2) g^2, w -= lr (m^ / (sqrt(v^) +
            eps) + decay w)
    sgd     torch's fused: b = momentum b + g + decay w, w -= lr b
    muon    torch's, for the matrices of the body (2502.16982: steps of AdamW's root mean square, so
            that they share lr and decay), and AdamW for embeddings, head and vectors"""
    groups = parameter_groups(model, config.weight_decay, split=config.base == "muon")
    adam: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "fused": True,
    }
    optimizer: Optimizer
    if config.base == "sgd":
        optimizer = SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
    elif config.base == "muon":
        muon = Muon(
            groups[:1],
            lr=config.lr,
            momentum=config.muon_momentum,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        optimizer = MuonAndAdamW(muon, AdamW(groups[1:], **adam))
    else:
        optimizer = AdamW(groups, **adam)
    return optimizer


def describe_groups(optimizer: Optimizer) -> str:
    """Returns one line that says which group holds how many parameters and how they decay."""
    parts = (
        f"{g['name']} {len(g['params'])} tensors, {sum(p.numel() for p in g['params']):,} numbers,"
        f" decay {g['weight_decay']:g}"
        for g in optimizer.param_groups
    )
    return "; ".join(parts)


def state_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Returns the optimiser's state as tensors by `<parameter name>.<key>`, in the form that a
    checkpoint keeps."""
    return {
        f"{name}.{key}": value
        for name, p in model.named_parameters()
        for key, value in optimizer.state.get(p, {}).items()
    }


def load_state_tensors(model: nn.Module, optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restores what `state_tensors` returned. Raises KeyError where the tensors name a parameter
    that the model does not have."""
    parameters = dict(model.named_parameters())
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition(".")
        p = parameters[name]
        # Moments have the shape of their parameter and are cut as it is; the count of steps is not.
        if value.shape == p.shape:
            shard = shard_of(value, p).to(p.device, copy=True)
            optimizer.state[p][key] = sharded_as(shard, p)
        else:
            optimizer.state[p][key] = value.to(p.device)
