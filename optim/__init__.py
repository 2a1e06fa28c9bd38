"""How a gradient is made, and what is done with it."""

from optim.adamw import build_optimizer
from optim.flops import forward_flops
from optim.schedule import Schedule, build_schedule
from optim.sharpness import Gradient, RuleResult

__all__ = ["Gradient", "RuleResult", "Schedule", "build_optimizer", "build_schedule", "forward_flops"]
