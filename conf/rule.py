"""The keys of the gradient rule and of the base optimiser: `optim.*`."""

from collections import ChainMap
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from conf.key import STEPS, key

T = TypeVar("T")


class Registry(dict[str, Any]):
    """The parts that an axis of the gradient rule may take, by name; each registers itself when
    `optim` is imported."""

    def register(self, name: str) -> Callable[[T], T]:
        """Returns a decorator that adds a class or function under a name. Raises ValueError for a
        name that is taken: methods of others would silently become something else."""

        def add(part: T) -> T:
            if name in self:
                raise ValueError(f"{name} is the name of {self[name]} already; choose another")
            self[name] = part
            return part

        return add


class AllBut(Collection[str]):
    """The names of a registry but one, whatever registers later."""

    def __init__(self, registry: Registry, name: str) -> None:
        self.registry = registry
        self.name = name

    def __contains__(self, name: object) -> bool:
        return name in self.registry and name != self.name

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.registry if name != self.name)

    def __len__(self) -> int:
        return len(self.registry) - (self.name in self.registry)


PATHS = Registry()  # optim.path of every rule that moves the weights
COTANGENT_PATHS = Registry()  # those of them that keep the clean cotangent r
DIRECTIONS = Registry()
METRICS = Registry()
WEIGHTINGS = Registry()
COMBINATIONS = Registry()
MOVED = ("optim.path", PATHS)
ADAM = ("optim.base", ("adamw", "muon"))


@dataclass
class RuleConfig:
    """The axes of the gradient rule; path=none is the plain gradient and reads no other axis."""

    path: str = key(
        "none",
        "what is evaluated at the moved point; none: the weights are not moved",
        choices=ChainMap(PATHS, {"none": None}),
    )
    direction: str = key(
        "gradient", "what the weights move along", read_when=MOVED, choices=DIRECTIONS
    )
    metric: str = key(
        "euclidean",
        "how the direction is scaled",
        read_when=MOVED,
        choices=METRICS,
    )
    scope: str = key(
        "batch",
        "who shares one perturbation",
        read_when=MOVED,
        choices=("batch", "replica", "micro_batch"),
    )
    weights: str = key(
        "uniform",
        "weights of the instances in the ascent loss",
        read_when=MOVED,
        choices=WEIGHTINGS,
    )
    combine: str = key(
        "replace",
        "what is done with the clean and the moved gradient",
        read_when=MOVED,
        choices=COMBINATIONS,
    )
    rho: float = key(0.05, "radius of the perturbation", low=0.0, high=1e6, read_when=MOVED)
    start: float = key(
        0,
        "first perturbed step; below 1 a fraction of the horizon",
        low=0,
        high=STEPS,
        read_when=MOVED,
    )
    stop: float | None = key(
        None,
        "first step no longer perturbed; up to 1 a fraction of the horizon; default never",
        low=0,
        high=STEPS,
        read_when=MOVED,
    )
    period: int = key(1, "perturb every k-th step", low=1, high=STEPS, read_when=MOVED)
    ascent_fraction: float = key(
        1.0,
        "share of the batch (or group) the ascent gradient is taken on",
        above=0.0,
        high=1.0,
        read_when=MOVED,
    )
    parameters: str = key(
        "all",
        "which are perturbed: all, no_embeddings, no_norms, head, or a pattern of names as *.mlp.*",
        read_when=MOVED,
    )
    angle: float = key(
        45.0,
        "degrees between the logit (0) and the functional (90) path",
        low=0.0,
        high=90.0,
        read_when=("optim.path", ("angle",)),
    )
    angle_norm: str = key(
        "max",
        "scale of the two angle terms",
        choices=("max", "paper"),
        read_when=("optim.path", ("angle",)),
    )
    second_moment: str = key(
        "with_gradient",
        "Adam's v as this step would leave it, or as it stands",
        read_when=("optim.metric", ("adam",)),
        choices=("with_gradient", "before"),
    )
    metric_power: float = key(
        0.5,
        "power of v in the Adam metric",
        above=0.0,
        high=10.0,
        read_when=("optim.metric", ("adam",)),
    )
    metric_eps: float | None = key(
        None,
        "epsilon of the Adam metric; default Adam's own",
        low=0.0,
        high=1e6,
        read_when=("optim.metric", ("adam",)),
    )
    metric_norm: str = key(
        "l2",
        "norm that sets the radius: |d|, |q| or sqrt(q.d)",
        read_when=("optim.metric", ("adam",)),
        choices=("l2", "raw", "dual"),
    )
    adaptive_floor: float = key(
        0.01,
        "added to |w| in the adaptive metric",
        low=0.0,
        high=1e6,
        read_when=("optim.metric", ("adaptive",)),
    )
    friendly_sigma: float = key(
        1.0,
        "share of the gradient's average that is removed",
        low=0.0,
        high=1e3,
        read_when=("optim.direction", ("friendly",)),
    )
    friendly_decay: float = key(
        0.9,
        "decay of that average",
        low=0.0,
        high=0.999999,
        read_when=("optim.direction", ("friendly",)),
    )
    alpha: float = key(
        0.7,
        "strength of the reused (LookSAM) or removed (GSAM) part",
        low=0.0,
        high=1e6,
        read_when=("optim.combine", AllBut(COMBINATIONS, "replace")),
    )
    delta_sigma: float = key(
        0.15,
        "standard deviation of delta-SAM's probes, in units of rms(w)",
        above=0.0,
        high=1e3,
        read_when=("optim.weights", ("delta",)),
    )
    delta_power: float = key(
        1.0,
        "power of the curvature in delta-SAM's weights",
        low=0.0,
        high=1e2,
        read_when=("optim.weights", ("delta",)),
    )
    delta_probe: str = key(
        "central",
        "second difference along one probe, or mixed along two",
        read_when=("optim.weights", ("delta",)),
        choices=("central", "mixed"),
    )
    delta_descent: str = key(
        "plain",
        "the loss at the moved point: the plain mean, or weighted as the ascent's",
        choices=("plain", "reweighted"),
        read_when=("optim.weights", ("delta",)),
    )
    cotangent: str = key(
        "auto",
        "keep the clean cotangent, or rebuild it chunk by chunk",
        read_when=("optim.path", COTANGENT_PATHS),
        choices=("auto", "store", "rebuild"),
    )
    cotangent_share: float = key(
        0.5,
        "share of free memory that cotangent=auto may fill",
        above=0.0,
        high=1.0,
        mutable=True,
        read_when=("optim.cotangent", ("auto",)),
    )
    compute: str = key(
        "precision",
        "precision of the rule's passes: the run's own, or IEEE fp32",
        read_when=MOVED,
        choices=("precision", "fp32"),
    )


@dataclass
class OptimConfig(RuleConfig):
    """The base optimiser, the gradient rule, and when the rule acts."""

    name: str = key("adamw", "name of the method, used in the run's name")
    base: str = key(
        "adamw",
        "base optimiser that steps on the rule's gradient; muon: torch's, for the blocks' matrices,"
        " beside AdamW",
        choices=("adamw", "sgd", "muon"),
    )
    lr: float = key(1e-3, "peak learning rate", above=0.0, high=1e6)
    momentum: float = key(
        0.9, "momentum of SGD", low=0.0, high=0.999999, read_when=("optim.base", ("sgd",))
    )
    muon_momentum: float = key(
        0.95,
        "momentum of Muon, Nesterov's",
        low=0.0,
        high=0.999999,
        read_when=("optim.base", ("muon",)),
    )
    beta1: float = key(0.9, "decay of the first moment", low=0.0, high=0.999999, read_when=ADAM)
    beta2: float = key(0.95, "decay of the second moment", low=0.0, high=0.999999, read_when=ADAM)
    eps: float = key(1e-8, "Adam's epsilon", above=0.0, high=1e6, read_when=ADAM)
    weight_decay: float = key(
        0.1, "decay of matrices only: decoupled, SGD's in the gradient", low=0.0, high=1e6
    )
    clip: float | None = key(
        1.0, "clip the final gradient at this global norm; null: never", above=0.0, high=1e30
    )
    rho_schedule: str = key(
        "constant",
        "radius from start to stop; warmup: rises from 0; cosine: falls to 0; lr: as the learning"
        " rate",
        read_when=MOVED,
        choices=("constant", "warmup", "cosine", "lr"),
    )
    rho_warmup: float = key(
        0.1,
        "share of the perturbed steps in which the radius warms up",
        above=0.0,
        high=1.0,
        read_when=("optim.rho_schedule", ("warmup",)),
    )
    num_groups: int = key(
        1,
        "groups of the global batch that are perturbed apart",
        low=1,
        high=2**20,
        read_when=("optim.scope", ("micro_batch",)),
    )
    compute_matched: bool = key(
        False,
        "shorten the run until its FLOPs equal AdamW's over the full schedule",
        read_when=MOVED,
    )
    diagnostics_every: int | None = key(
        None,
        "logged steps between diagnostics that cost passes: fidelity, parts of SAM's change; never"
        " by default",
        low=1,
        high=STEPS,
        mutable=True,
        read_when=MOVED,
    )
