"""BAR: the balancedness that SAM brings to low-rank adapters, without its second gradient."""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from model.sharding import is_sharded, local

# X and Y, as peft and most others call them
ATTRIBUTES = (
    ("lora_B", "lora_A"),
    ("lora_embedding_B", "lora_embedding_A"),
)


@dataclass(frozen=True)
class Pair:
    """The two factors of one layer's X Y^T, and the optimiser's group that each is in."""

    name: str
    x: Tensor  # out x r: peft's B
    y: Tensor  # r x in: peft's A, that is Y^T
    x_group: int
    y_group: int


def _factors(member: nn.Module | Tensor) -> dict[str, Tensor | None]:
    """Returns the factors by adapter, "" where the layer has but one: a parameter is a factor, a
    linear layer or convolution holds one."""
    entries = (
        dict(member.items())
        if isinstance(member, (nn.ModuleDict, nn.ParameterDict))
        else {"": member}
    )
    return {
        key: entry if isinstance(entry, Tensor) else getattr(entry, "weight", None)
        for key, entry in entries.items()
    }


def lora_pairs(module: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
    """Returns (name, X, Y) of every layer and adapter of which both factors are trainable, wherever
    in `module` it is.

    Raises ValueError where a layer's two members are not factors of the same adapters."""
    found = []
    for name, layer in module.named_modules():
        # Not getattr: wrappers such as peft's forward it to what they wrap.
        members = {**dict(layer.named_children()), **dict(layer.named_parameters(recurse=False))}
        for x_attribute, y_attribute in ATTRIBUTES:
            if not {x_attribute, y_attribute} <= members.keys():
                continue
            xs, ys = _factors(members[x_attribute]), _factors(members[y_attribute])
            if xs.keys() != ys.keys() or None in xs.values() or None in ys.values():
                raise ValueError(
                    f"module: {x_attribute} and {y_attribute} of {name!r} are no pairs; give both a"
                    " weight for the same adapters"
                )
            found += [
                (".".join(filter(None, (name, adapter))), x, ys[adapter])
                for adapter, x in xs.items()
            ]
    return [
        (name, x, y)
        for name, x, y in found
        if x is not None and y is not None and x.requires_grad and y.requires_grad
    ]


def _norms(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Returns Euclidean norms, accumulated in `dtype`. Those of sharded tensors (DTensors) are
    of the whole tensor, by one all-reduce."""
    norms = torch.stack(torch._foreach_norm(tensors, 2, dtype))
    if is_sharded(norms):
        return norms.full_tensor()  # type: ignore[attr-defined]
    return norms


def _check_options(mu: float, form: str, schedule: str, steps: int | None) -> None:
    """Raises ValueError for an option that is out of range."""
    if form not in ("nbar", "obar"):
        raise ValueError(f"form={form!r}; choose nbar or obar")
    if schedule not in ("constant", "linear", "cosine"):
        raise ValueError(f"schedule={schedule!r}; choose constant, linear or cosine")
    if not 0 <= mu < math.inf:
        raise ValueError(f"mu={mu:g}; choose a finite number of at least 0, 0.5 for a start")
    if schedule != "constant" and (steps is None or steps < 1):
        raise ValueError(
            f"steps={steps}; schedule={schedule!r} needs the number of steps after which mu is zero"
        )


def _check_factor(name: str, p: Tensor, groups: dict[int, int], owners: dict[int, str]) -> None:
    """Raises ValueError for a factor that is not in the optimiser, is too narrow to be scaled, or
    belongs to another pair of `owners`, to which it is added."""
    if id(p) not in groups:
        raise ValueError(
            f"optimizer: it does not hold a factor of {name!r}; make it after the adapters, or"
            " freeze that pair"
        )
    if p.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"module: a factor of {name!r} is {p.dtype}, where scales of 1 + s round to 1 (bfloat16"
            " at s = 1e-3); keep the factors in float32, autocast may compute in bfloat16"
        )
    # Views of one tensor are one factor, too.
    owner = owners.setdefault(local(p).data_ptr() or id(p), name)
    if owner != name:
        raise ValueError(
            f"module: {owner!r} and {name!r} share a factor, which would be scaled twice; untie"
            " them or freeze one pair"
        )


class BAR:
    """Balancedness-aware regularisation of LoRA pairs (Li, Zhang, He: arXiv 2410.14802).

    For W + X Y^T and the gradients gX, gY, SAM moves the balancedness (|X|^2 - |Y|^2) / 2 with the
    sign of |gX|^2 - |gY|^2. BAR does that by rescaling the factors, with s = mu_t lr_t and
    Frobenius norms, each pair by itself:

        nbar    |gX| >= |gY|:  X *= 1 + s,  Y *= 1 - s      else  X *= 1 - s,  Y *= 1 + s
        obar    |X|  >= |Y| :  X *= 1 - s,  Y *= 1 + s      else  X *= 1 + s,  Y *= 1 - s

    The product keeps its direction: it is scaled by 1 - s^2. In peft's layers X is B (out x r) and
    Y^T is A (r x in); any layer with members lora_A and lora_B (linear layers, convolutions,
    parameters, or dictionaries of them by adapter) or lora_embedding_A and _B will do.

        mu          mu_0; mu_t falls to zero over `steps` calls by schedule="linear" (1 - t / steps)
                    or "cosine" ((1 + cos(pi t / steps)) / 2)
        lr_t        of the pair's parameter group, read at every step
        optimizer   holds the factors; make it first, and both after the adapters are chosen, since
                    frozen pairs are left out

    A pair whose gradients are missing, both zero or not finite is left alone for that step: an
    adapter that is not in use keeps its weights however gradients are emptied. Nothing of this
    waits for the device.

    Raises ValueError where there is no trainable pair; where a factor is not in the optimiser,
    belongs to two pairs, is not in fp32 (or fp64) or has another learning rate than its partner;
    where an option is out of range; and, from `step`, where s reaches 1."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        mu: float = 0.5,
        form: str = "nbar",
        schedule: str = "constant",
        steps: int | None = None,
    ) -> None:
        _check_options(mu, form, schedule, steps)
        self.optimizer = optimizer
        self.mu = mu
        self.form = form
        self.schedule = schedule
        self.steps = steps
        self.done = 0
        # By identity: the group of each parameter, and the pair that a factor belongs to.
        groups: dict[int, int] = {}
        for index, group in enumerate(optimizer.param_groups):
            groups |= {id(p): index for p in group["params"]}
        owners: dict[int, str] = {}
        self.pairs = []
        for name, x, y in lora_pairs(module):
            for p in (x, y):
                _check_factor(name, p, groups, owners)
            self.pairs.append(Pair(name, x, y, groups[id(x)], groups[id(y)]))
            self._lr(self.pairs[-1])
        if not self.pairs:
            raise ValueError(
                "module: no trainable LoRA pair in it; wrap it with peft.get_peft_model, or"
                " unfreeze an adapter (set_adapter)"
            )

    def _lr(self, pair: Pair) -> float | Tensor:
        """Returns the learning rate of a pair. Raises ValueError where its factors have two."""
        x_lr = self.optimizer.param_groups[pair.x_group]["lr"]
        y_lr = self.optimizer.param_groups[pair.y_group]["lr"]
        if pair.x_group != pair.y_group and x_lr != y_lr:
            raise ValueError(
                f"optimizer: lr={float(x_lr):g} for X (B) and {float(y_lr):g} for Y (A) of"
                f" {pair.name!r}; give both the same"
            )
        return x_lr

    def mu_at(self, step: int) -> float:
        """Returns mu_t of the call after `step` others."""
        progress = 0.0
        if self.steps:
            progress = min(1.0, step / self.steps)
        fraction = {
            "constant": 1.0,
            "linear": 1 - progress,
            "cosine": (1 + math.cos(math.pi * progress)) / 2,
        }
        return self.mu * fraction[self.schedule]

    @torch.no_grad()
    def step(self) -> dict[str, Tensor]:
        """Rescales the pairs by the gradients in .grad; call it once for each `optimizer.step()`
        that is taken, before it.

        Returns the balancedness (|X|^2 - |Y|^2) / 2 of every pair, as it was before, by name:
        scalars on the pair's device, so that only who reads them waits for it. For logs, read them
        at once: `torch.stack([*balancedness.values()]).tolist()`."""
        # Pairs of one device, dtype and group are rescaled by a few kernels for all of them.
        batches = defaultdict(list)
        for pair in self.pairs:
            lr = self._lr(pair)
            if not isinstance(lr, Tensor) and self.mu_at(self.done) * lr >= 1:
                raise ValueError(
                    f"mu={self.mu:g}: s = mu lr reaches 1 at lr={lr:g}, where 1 - s is no scale;"
                    " lower mu"
                )
            batches[pair.x.device, pair.x.dtype, pair.x_group].append(pair)
        balancedness: dict[str, Tensor] = {}
        for pairs in batches.values():
            names = [pair.name for pair in pairs]
            balancedness |= zip(names, self._rescale(pairs).unbind(), strict=True)
        self.done += 1
        return {pair.name: balancedness[pair.name] for pair in self.pairs}

    def _rescale(self, pairs: list[Pair]) -> Tensor:
        """Rescales pairs of one device, dtype and group; returns their balancedness before."""
        # A missing gradient counts as NaN, so that its pair is left alone without a question to the
        # device.
        factors = [pair.x for pair in pairs] + [pair.y for pair in pairs]
        gradients = [torch.full_like(p, math.nan) if p.grad is None else p.grad for p in factors]
        dtype = pairs[0].x.dtype
        x, y, gx, gy = norms = _norms(factors + gradients, dtype).view(4, -1)
        grows = gx >= gy if self.form == "nbar" else x < y
        acts = norms.isfinite().all(dim=0) & (gx + gy > 0)
        scale = self.mu_at(self.done) * self.optimizer.param_groups[pairs[0].x_group]["lr"]
        # s is positive where X grows, negative where Y does, and 0 where the pair is left alone.
        s = (2 * grows.to(dtype) - 1) * acts * scale
        torch._foreach_mul_([local(p) for p in factors], list(torch.cat([1 + s, 1 - s]).unbind()))
        return (x - y) * (x + y) / 2

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of steps taken, on which mu_t depends."""
        return {"step": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.done = int(state["step"])
