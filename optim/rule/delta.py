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

from functools import partial

import torch
from torch import Tensor

from conf.rule import RuleConfig
from model.sharding import compute_device
from optim.gradient import MicroBatch
from optim.rule.conditions import ieee_fp32, rounds, same_buffers
from optim.rule.descent import terms_of
from optim.rule.perturbation import move_on, moved
from optim.rule.tensors import norm
from optim.rule.weights import InstanceLosses, SumOverGroup, Weighting, weighting


@weighting("delta")
class Delta(Weighting):
    """w_i in proportion to c_i^p."""

    in_fp32 = True

    @classmethod
    def check(cls, axes: RuleConfig) -> None:
        if axes.delta_descent != "reweighted":
            return
        if not terms_of(axes).full:
            raise ValueError(
                "delta_descent=reweighted weighs the loss at the moved point, which"
                f" path={axes.path} does not take; use path=full"
            )
        if axes.ascent_fraction < 1:
            raise ValueError(
                "delta_descent=reweighted needs a weight of every instance, and"
                f" ascent_fraction={axes.ascent_fraction:g} leaves some without; use"
                " ascent_fraction=1 or delta_descent=plain"
            )

    @classmethod
    def forwards(cls, axes: RuleConfig, rough: bool) -> int:
        # Where the clean pass rounds, the losses between the probes are taken once more in fp32.
        probes = 2 if axes.delta_probe == "central" else 3
        return probes + rough

    @classmethod
    def copies(cls, axes: RuleConfig) -> int:
        return 1 if axes.delta_probe == "central" else 3

    @classmethod
    def weights_moved_loss(cls, axes: RuleConfig) -> bool:
        return axes.delta_descent == "reweighted"

    def prepare(self, group: list[MicroBatch], losses: InstanceLosses, add: SumOverGroup) -> None:
        counted = torch.stack([micro.counted_B.count_nonzero() for micro in group]).sum()
        if int(add(counted)) <= 1:
            # One instance weighs 1.
            return
        device = compute_device(next(iter(self.moving.values())))
        centres: list[Tensor | None] = [None] * len(group)
        rough = rounds(device)
        with same_buffers(self.module), ieee_fp32(device):
            offsets = self.probe(losses)
            if rough:
                # Else c would be a difference between losses of two precisions.
                centres = [*losses()]
        # The weights themselves are made in the clean pass, as soon as it knows l_i(t).
        for micro, offsets_B, centres_B in zip(group, offsets, centres, strict=True):
            micro.weighting = partial(self.weights_of, offsets_B, centres_B)

    def probe(self, losses: InstanceLosses) -> list[Tensor]:
        """Returns what is to be added to -2 l_i(t) (central) or l_i(t) (mixed) in c_i, for every
        instance of every micro-batch."""
        parameters = list(self.moving.values())
        sigma = self.sigma(parameters)
        z = self.draw("z/")
        # (coefficient of l_i, noise d, sign): the loss at t + sign sigma d
        points = [(1.0, z, 1.0), (1.0, z, -1.0)]
        if self.axes.delta_probe == "mixed":
            other = self.draw("other/")
            both = [a + b for a, b in zip(z, other, strict=True)]
            points = [(1.0, both, 1.0), (-1.0, z, 1.0), (-1.0, other, 1.0)]
        found: list[list[Tensor]] = []
        # From one point straight to the next: each way back would cost a copy of all weights.
        with moved(parameters, points[0][1], points[0][2] * sigma, self.module) as saved:
            for coefficient, noise, sign in points:
                if found:
                    move_on(parameters, saved, noise, sign * sigma, self.module)
                found.append([coefficient * losses_B for losses_B in losses()])
        return [torch.stack(parts).sum(0) for parts in zip(*found, strict=True)]

    def sigma(self, parameters: list[Tensor]) -> float:
        """Returns sigma rms(w), without the rows that pad a vocabulary."""
        # rms(w) = |w| / sqrt(count); padding is 0 and would make it too small.
        count = sum(w.numel() for w in parameters)
        for name, rows in self.direction.rows.items():
            if name in self.moving:
                count -= (len(self.moving[name]) - rows) * self.moving[name].shape[1]
        return self.axes.delta_sigma * norm(parameters).item() / count**0.5

    def draw(self, kind: str) -> list[Tensor]:
        """Returns noise for every parameter."""
        return [self.direction.noise(name, p, kind) for name, p in self.moving.items()]

    def weights_of(
        self, offsets_B: Tensor, centres_B: Tensor | None, which: slice, losses_b: Tensor
    ) -> Tensor:
        """Returns c_i^p of some instances of a micro-batch, from what `probe` found and their
        losses at t."""
        if centres_B is not None:
            losses_b = centres_B[which]
        factor = 1
        if self.axes.delta_probe == "central":
            factor = -2
        return (offsets_B[which] + factor * losses_b).abs().pow(self.axes.delta_power)
