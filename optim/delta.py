"""delta-SAM (2112.08772): instances that lie in sharp places weigh more in the ascent.

    c_i = |l_i(t + z) + l_i(t - z) - 2 l_i(t)|                     central: two extra forwards
    c_i = |l_i(t + z + z') - l_i(t + z) - l_i(t + z') + l_i(t)|    mixed: three
    w_i = c_i^p N / sum_j n_j c_j^p                                ascent loss sum_i w_i n_i l_i / N

l_i is the mean loss over the n_i counted tokens of instance i, z ~ N(0, sigma^2 rms(w)^2) over the
perturbed weights, and a factor of c, such as 1 / |z|^2, drops out of w. The forwards see the
dropout masks of the step and compute in IEEE fp32, whatever the run's precision: c is a small
difference of losses. l_i(t) comes with the weighted pass, or from one more forward where that pass
rounds. The vocabulary's padding has no noise and no part in rms(w). No gradient goes through w; an
instance without counted tokens weighs nothing."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from conf.schema import RuleConfig
from optim.direction import Direction
from optim.perturbation import move_on, moved, norm

# one forward over a group: the instance losses of every micro-batch
Losses = Callable[[], list[Tensor]]


def probe(
    axes: RuleConfig,
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    direction: Direction,
    losses: Losses,
) -> list[Tensor]:
    """What is to be added to -2 l_i(t) (central) or l_i(t) (mixed) in c_i, for every instance of
    every micro-batch."""
    weights = list(parameters.values())
    padding = sum(
        (len(parameters[name]) - rows) * parameters[name].shape[1]
        for name, rows in direction.rows.items()
        if name in parameters
    )
    sigma = (
        axes.delta_sigma * norm(weights).item() / (sum(w.numel() for w in weights) - padding) ** 0.5
    )

    def draw(kind: str) -> list[Tensor]:
        """Noise for every parameter."""
        return [direction.noise(name, parameter, kind) for name, parameter in parameters.items()]

    z = draw("z/")
    if axes.delta_probe == "central":
        # losses counted so many times, at t + so many times the noise
        points = [
            (1.0, z, 1.0),
            (1.0, z, -1.0),
        ]
    else:
        other = draw("other/")
        points = [
            (1.0, [a + b for a, b in zip(z, other, strict=True)], 1.0),
            (-1.0, z, 1.0),
            (-1.0, other, 1.0),
        ]
    found: list[list[Tensor]] = []
    with moved(weights, points[0][1], points[0][2] * sigma, module) as saved:
        for times, directions, sign in points:
            if found:
                move_on(weights, saved, directions, sign * sigma, module)
            found.append([times * losses_B for losses_B in losses()])
    return [torch.stack(parts).sum(0) for parts in zip(*found, strict=True)]


def weigh(axes: RuleConfig, offsets_B: Tensor, which: slice, losses_b: Tensor) -> Tensor:
    """c_i^p of some instances of a micro-batch, from what `probe` found and their losses at t."""
    return (
        (offsets_B[which] + (-2 if axes.delta_probe == "central" else 1) * losses_b)
        .abs()
        .pow(axes.delta_power)
    )
