"""How a gradient is made, and what is done with it."""

from optim.adamw import build_optimizer
from optim.adapter import Adapter
from optim.bar import BAR
from optim.flops import ForwardFlops, forward_flops
from optim.gradient import Gradient, RuleResult
from optim.rule.axes import check_axes, passes
from optim.rule.sharpness import SharpnessAware, build_rule
from optim.schedule import Schedule, build_schedule

__all__ = [
    "BAR",
    "Adapter",
    "ForwardFlops",
    "Gradient",
    "RuleResult",
    "Schedule",
    "SharpnessAware",
    "build_optimizer",
    "build_rule",
    "build_schedule",
    "check_axes",
    "forward_flops",
    "passes",
]
