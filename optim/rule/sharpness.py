"""The gradient of every sharpness-aware rule, as one rule with axes that combine.

batches -> rule.gradient -> p.grad -> clip -> base optimiser

SAM (2010.01412) is three lines of `SharpnessAware.perturbed`:

    ascent = self.take_clean_pass(...)             g = J(t)^T r(t)
    move = self.make_move(ascent, ...)             e = rho g / |g|
    with moved(...): self.take_moved_pass(...)     J(t + e)^T r(t + e)

Functional-SAM (2502.02407) keeps r(t) in the first and takes J(t + e)^T r(t) in the third;
`optim.rule.descent` has both products, one below the other.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from conf.rule import (
    COMBINATIONS,
    DIRECTIONS,
    METRICS,
    WEIGHTINGS,
    OptimConfig,
    RuleConfig,
)
from model.gpt import GPT
from model.sharding import shard_of, sharded_as
from optim.adapter import Adapter
from optim.gradient import Gradient, MicroBatch, RuleResult, Step, named_gradients, take_gradients
from optim.rule.ascent import Ascent, CleanPass
from optim.rule.axes import check_optimizer, check_span, make_axes, needs_gradient
from optim.rule.combine import Combination, combine_in_place, overlap_of
from optim.rule.conditions import ieee_fp32, random_state, same_buffers
from optim.rule.cotangents import CotangentStorage
from optim.rule.descent import Terms, moved_pass, terms_of
from optim.rule.diagnostics import Diagnostics
from optim.rule.directions import Direction, q_of
from optim.rule.fraction import cut
from optim.rule.metrics import Metric
from optim.rule.parameters import choose
from optim.rule.perturbation import Move, moved
from optim.rule.scope import SCOPES, Scope
from optim.rule.tensors import norm
from optim.rule.weights import Weighting
from optim.schedule import Schedule


class SharpnessAware(Gradient):
    """The gradient of every sharpness-aware rule: a point in the product of a few axes.

    Let t be the weights, L the loss summed over the counted tokens of the step and divided by their
    number N, r = dL/dF its derivative by the logits F, J = dF/dt, g = J^T r. A step moves the
    weights to t~ = t + e, looks there, moves them back, and leaves in p.grad

        path         of `optim.rule.descent`: full J(t~)^T r(t~) (SAM), functional J(t~)^T r(t)
                     (Functional-SAM), logit J(t)^T r(t~), or an angle between the last two

    The move is e = rho d / n(d), d = P q, over the perturbed parameters (`parameters`), each tied
    tensor once:

        direction    q, of `optim.rule.directions`: gradient (g of the ascent loss), momentum,
                     stale, friendly, random
        metric       P and n, of `optim.rule.metrics`: euclidean, adam, adaptive
        weights      of the instances in the ascent loss, of `optim.rule.weights`: uniform, delta
        scope        of `optim.rule.scope`: one e for the whole batch, for each element of `batches`
                     (micro_batch), or for each replica
        ascent_fraction    the share of the group's instances, its first ones over all processes, on
                           which the ascent gradient is taken

    and afterwards g_rule may be combined with g:

        combine      of `optim.rule.combine`: replace, orthogonal (GSAM), reuse (LookSAM)

    `start`, `stop` (steps) and `period` say when; in between the plain gradient is taken. rho=0
    runs all passes and moves nothing. `rho` may be set anew before any step. `cotangent` says
    whether r is stored or rebuilt (`optim.rule.cotangents`).

    Every pass over the batch replays the random stream, so that all see the same dropout masks and
    a step leaves the generator where a plain step does (but that a micro-batch which
    `ascent_fraction` cuts draws the masks of its two parts one after the other). Gradients are raw:
    clipping comes after, once. Norms are of fp32 or wider. Nothing is kept in the optimiser; what
    the next step depends on is in `state_dict`.

    Args:
        model: a GPT, an Adapter, or any module that gives logits
        optimizer: which steps on the rule's gradient; its moments are read, never written
        axes: see `conf.rule.RuleConfig`; path is full where it is not given

    Raises:
        ValueError: for an axis that does not exist, a value out of range, a combination that means
            nothing, and an optimiser that lacks what the axes read
    """

    def __init__(self, model: GPT | Adapter | nn.Module, optimizer: Optimizer, **axes: Any) -> None:
        super().__init__(model)
        self.axes = make_axes({"path": "full"} | axes)
        check_span(self.axes)
        self.optimizer = optimizer
        self.rho = self.axes.rho
        self.moving = choose(self.module, self.parameters, self.axes.parameters)
        check_optimizer(self.axes, optimizer, self.moving)

        # One part of each axis, chosen by its name; the order matters where one reads another.
        self.terms: Terms = terms_of(self.axes)
        self.direction: Direction = DIRECTIONS[self.axes.direction](self.axes, optimizer)
        self.metric: Metric = METRICS[self.axes.metric](self.axes, optimizer)
        self.weighting: Weighting = WEIGHTINGS[self.axes.weights](
            self.axes, self.module, self.moving, self.direction
        )
        self.combination: Combination = COMBINATIONS[self.axes.combine](self.axes)
        self.scope: Scope = SCOPES[self.axes.scope](self, list(self.moving.values()))
        self.cotangents = CotangentStorage(self.axes, self)
        self.diagnostics = Diagnostics(self)

        # Each process cuts its shards out of the same noise, so all take the seed of the first.
        self.direction.seed = self.layout.all_gather(self.direction.seed)[0]
        self.direction.rows = self.module.unpadded_rows if isinstance(self.module, GPT) else {}
        self.needs_gradient = needs_gradient(self.axes)
        self.observes_gradient = self.direction.observes_gradient()

    # When

    def moves_at(self, step: int) -> bool:
        """Returns whether the weights are moved in a step, counted from 0."""
        return self.acts_at(step) and (step - self.axes.start) % self.axes.period == 0

    def acts_at(self, step: int) -> bool:
        """Returns whether a step lies from `start` to before `stop`."""
        if step < self.axes.start:
            return False
        return self.axes.stop is None or step < self.axes.stop

    # The step

    def gradient(
        self, batches: Sequence[Any], logged: bool = True, diagnose: bool = False
    ) -> RuleResult:
        """Leaves the rule's gradient in p.grad, which must be empty, averaged over all counted
        tokens, and returns what the step was. Weights, their addresses and buffers are afterwards
        what a plain step would leave, even where a pass raises.

        Args:
            batches: the micro-batches (inputs, targets) of the step; with scope=micro_batch each
                element is one group, and may be a list of micro-batches. The caller's autocast
                holds
            logged: whether metrics are wanted
            diagnose: and those that cost passes
        """
        step = self.begin(batches, logged, diagnose)
        if self.moves_at(step.number):
            step.result.metrics["sharpness/rho"] = self.rho
            # In fp32 under compute=fp32: diagnostics measure the rule as it is computed.
            with ieee_fp32(self.device) if self.axes.compute == "fp32" else nullcontext():
                if diagnose:
                    self.diagnostics.decompose(step.groups[0], step)
                    self.diagnostics.measure_fidelity(step.groups[0], step)
                # Every group, so that the random stream ends where a plain step leaves it.
                finite = [self.perturbed(group, step, self.terms) for group in step.groups]
            step.result.finite = all(finite)
        else:
            # Off the period, and before start and from stop on, the rule is the plain gradient. Its
            # direction may observe it: an average of gradients must not miss a step.
            self.plain(step.micro_batches, step)
            step.clean = {}
            if self.observes_gradient:
                step.clean = named_gradients(self.parameters)
        self.sum_losses(step.result)
        self.finish(step)
        return step.result

    def begin(self, batches: Sequence[Any], logged: bool, diagnose: bool) -> Step:
        """Returns a step over batches, in the groups that move apart."""
        step = super().begin(batches, logged, diagnose)
        step.groups = self.scope.groups(step.groups)
        self.direction.step = step.number
        self.step += 1
        return step

    def perturbed(self, group: list[MicroBatch], step: Step, terms: Terms) -> bool:
        """Adds the gradient of one group, at a moved point of its own, to p.grad. Returns False
        where the ascent is not finite, and nothing was moved."""
        # A direction that reads no gradient (momentum, stale, random) is known beforehand.
        q: dict[str, Tensor] = {}
        if not self.direction.needs_gradient:
            q = self.directions({})
        # Without a direction, as before the first moment of Adam is there, and without a counted
        # target there is nowhere to move: the group contributes its plain gradient.
        has_direction = self.direction.needs_gradient or bool(q)
        if not (has_direction and self.scope.concurrent_tokens(group, step)):
            self.plain(group, step)
            return True
        # What earlier groups have left must not mix with the ascent gradient of this one.
        earlier = take_gradients(self.parameters)
        ascent = self.take_clean_pass(group, step, terms)
        move = self.make_move(ascent, q or self.directions(ascent.gradients))
        q.clear()
        # All replicas go on or none does: one that left alone would keep the others waiting in
        # their next sum.
        if self.scope.any_group(not math.isfinite(move.n)):
            return False
        self.diagnostics.log_ascent(ascent, move, step)
        self.keep_gradient(ascent, step)
        # One pass of a step updates the buffers: the clean one, or the moved one where there is no
        # clean one.
        with same_buffers(self.module) if ascent.took_pass else nullcontext():
            with moved([*move.parameters.values()], move.d, move.scale, self.module) as w_at_t:
                self.start_moved_gradient(earlier, ascent, terms)
                # The largest tensors of the step: the moved pass needs their memory.
                move.d.clear()
                self.take_moved_pass(
                    ascent, step, terms, dict(zip(move.parameters, w_at_t, strict=True))
                )
                self.diagnostics.log_move(ascent, move, w_at_t, step, terms)
            # A term that takes a pass at the clean weights (logit) needs the memory, too.
            w_at_t.clear()
            for term in terms.nonzero():
                term.finish(self, ascent, step)
        return True

    def take_clean_pass(self, group: list[MicroBatch], step: Step, terms: Terms) -> Ascent:
        """Takes the clean pass over a group, where anything of it is needed: g of the ascent loss,
        and the cotangent r."""
        # Groups add up to the gradient of the step when each counts by its share of the tokens.
        token_share = sum(micro.tokens for micro in group) / step.result.tokens
        ascent = Ascent(
            group, random_state(self.device), token_share, 1 / step.result.tokens, self.scope.reduce
        )
        ascent.took_pass = self.needs_gradient or terms.reads_cotangent
        if not ascent.took_pass:
            self.diagnostics.log_clean_loss(ascent, step)
            return ascent
        if self.axes.ascent_fraction < 1:
            # The parts of a cut micro-batch have counts of their own.
            ascent.group = cut(group, self.axes.ascent_fraction, self.scope)
            self.count_tokens(ascent.group, self.scope.sum)
        ascent.weights_moved_loss = self.weighting.weights_moved_loss(self.axes)
        # Diagnostics take other paths than the rule's, so that the pass is made for these terms.
        clean_pass = CleanPass(
            self,
            self.scope,
            self.cotangents,
            with_gradient=self.needs_gradient,
            with_r=bool(terms.functional),
            with_h=bool(terms.logit),
        )
        # Instance weights come before the pass, whose gradient is that of the weighted loss.
        with self.scope.without_replica_sync():
            self.weighting.prepare(
                ascent.group,
                lambda: self.instance_losses(ascent.group, step, ascent.random),
                self.scope.sum,
            )
            clean_pass.run(ascent, step)
        return ascent

    def directions(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns q of every parameter that moves, by name."""
        q = {}
        for name, parameter in self.moving.items():
            # A parameter that had no part in the pass has no gradient, and stays where it is.
            if not self.direction.needs_gradient or name in gradients:
                q[name] = q_of(self.direction, name, parameter, gradients.get(name))
        found = {name: along for name, along in q.items() if along is not None}
        if q and not found and self.direction.needs_gradient:
            raise ValueError(
                f"direction={self.axes.direction} returned None for every parameter, so nothing"
                " would move; return q"
            )
        return found

    def make_move(self, ascent: Ascent, q: dict[str, Tensor]) -> Move:
        """Returns the move e = rho d / n(d), d = P q; none where n(d) is 0."""
        parameters: dict[str, Tensor] = {name: self.moving[name] for name in q}
        along = list(q.values())
        # None where a parameter had no part in the clean pass.
        gradients = [ascent.gradients.get(name) for name in q]
        d = self.metric.scale(list(parameters.values()), along, gradients)
        n = self.metric.norm(d, along).item()
        # A gradient that vanishes gives no direction: such a move is none.
        scale = 0.0
        if n > 0:
            scale = self.direction.sign * self.rho / n
        return Move(parameters, d, n, scale)

    def take_moved_pass(
        self, ascent: Ascent, step: Step, terms: Terms, clean_weights: dict[str, Tensor]
    ) -> None:
        """Adds the terms of the path at the moved point to p.grad, given the clean weights of the
        parameters that moved, by name."""
        step.result.perturbed = True
        # r is rebuilt from, and the logit path's products are taken with, the head as it was at t.
        if terms.logit or (terms.functional and not self.cotangents.stores):
            ascent.clean_head = self.cotangents.clean_head(clean_weights)
        moved_pass(self, ascent, step, terms)
        ascent.clean_head = None

    def start_moved_gradient(
        self, earlier: dict[str, Tensor], ascent: Ascent, terms: Terms
    ) -> None:
        """Fills p.grad before the moved pass adds to it: with the gradient of earlier groups, and
        with the part of g that the path takes. Lets go of both."""
        for name, p in self.parameters.items():
            p.grad = earlier.pop(name, None)
        # A term works on g in place.
        g = ascent.gradients
        if terms.clean and self.combination.needs_gradient:
            # The combination has kept g itself.
            g = {name: gradient.clone() for name, gradient in g.items()}
        for term in terms.nonzero():
            term.start(self, ascent, g)
        ascent.gradients.clear()

    def keep_gradient(self, ascent: Ascent, step: Step) -> None:
        """Adds up g over the groups where the direction or the combination reads it. With one group
        the direction has it at once, so that it can be let go of."""
        combines = self.combination.needs_gradient
        if step.clean is None or not (self.observes_gradient or combines):
            return
        # The gradient of the only group is that of the step, and can be observed without a copy.
        whole = self.scope.is_whole(ascent.token_share)
        if whole and not combines:
            self.observe(ascent.gradients)
            return
        # What was remembered is replaced at the end of this step.
        self.combination.state = {}
        for name, gradient in ascent.gradients.items():
            own = gradient
            if not whole:
                own = self.scope.reduce(gradient * ascent.token_share)
            if name in step.clean:
                own = step.clean[name].add_(own)
            step.clean[name] = own

    def backward(self, value: Tensor, last: bool) -> None:
        """Adds the gradient of a micro-batch to p.grad. Raises ValueError for a sparse one, which
        has neither a norm nor a place to be moved."""
        super().backward(value, last)
        for name, p in self.parameters.items():
            if p.grad is not None and p.grad.layout != torch.strided:
                raise ValueError(
                    f"{name} has a sparse gradient, which rules that move the weights do not take;"
                    " make its embedding with sparse=False"
                )

    # The end of a step

    def finish(self, step: Step) -> None:
        """Combines g_rule with g, lets the direction know of both, and logs how they lie to each
        other. Nothing is left in p.grad, and nothing remembered, where the ascent was not
        finite."""
        if not step.result.finite:
            take_gradients(self.parameters)
            return
        update = named_gradients(self.parameters)
        # The norm costs a pass over all gradients: it is taken only where something reads it.
        size = None
        if self.looks_back(step):
            size = norm(list(update.values()))
        # A gradient that is not finite is skipped by the caller, and must not be remembered.
        if size is not None and size.isfinite():
            self.combine(step, update, size)
            if self.direction.observes_update():
                seen = named_gradients(self.parameters)
                self.direction.observe_update({k: g for k, g in seen.items() if k in self.moving})
            self.diagnostics.log_update(step)
        self.diagnostics.warn_of_rounding(step.result)

    def looks_back(self, step: Step) -> bool:
        """Returns whether anything reads the gradient of the rule before it is handed on."""
        remembers = bool(step.clean or self.combination.state)
        return step.logged or remembers or self.direction.observes_update()

    def combine(self, step: Step, update: dict[str, Tensor], size: Tensor) -> None:
        """Combines the gradient in p.grad, of norm `size`, with g."""
        # The direction observes g first: `combine` may overwrite it.
        clean = step.clean or {}
        if self.observes_gradient and clean:
            self.observe(clean)
        if not self.moves_at(step.number):
            if self.acts_at(step.number):
                self.combination.combine_plain(update, size)
            return
        if not clean:
            self.diagnostics.log_cosine(step, size)
            return
        # A parameter may have a part in the clean pass and none in the moved one.
        for name in clean.keys() - update.keys():
            update[name] = self.parameters[name].grad = torch.zeros_like(clean[name])
        g = list(clean.values())
        g_rule = [update[name] for name in clean]
        overlap = overlap_of(g, g_rule, size)
        # Both change their arguments in place: g is of no use afterwards but to be remembered.
        combine_in_place(self.combination, g, g_rule, overlap)
        self.combination.remember(clean, self.rho)
        # What is logged is the cosine with the gradient that is handed on.
        if self.combination.changes_update:
            overlap = overlap_of(g, g_rule, norm(g_rule))
        step.result.metrics["sharpness/cosine"] = overlap.cosine

    def observe(self, g: dict[str, Tensor]) -> None:
        """Lets the direction know of g, of the parameters that move."""
        self.direction.observe_gradient({name: g[name] for name in self.moving if name in g})

    # What a checkpoint keeps

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the step, the seed of noise, what the direction and the combination remember, and
        what cotangent=auto took: all that the next step depends on."""
        # Torch does little with unsigned numbers of 64 bits, so the seed is kept as a signed one.
        signed = self.direction.seed - (self.direction.seed >> 63 << 64)
        state = {"step": torch.tensor(self.step), "seed": torch.tensor(signed)}
        if self.cotangents.stores is not None:
            state["stores"] = torch.tensor(self.cotangents.stores)
        for owner, tensors in self.memories().items():
            state |= {f"{owner}/{name}": tensor for name, tensor in tensors.items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what `state_dict` returned; full tensors become this process's shards where the
        model is sharded."""
        self.step = int(state["step"])
        if "seed" in state:
            self.direction.seed = int(state["seed"]) % 2**64
        if "stores" in state and self.axes.cotangent == "auto":
            self.cotangents.stores = bool(state["stores"])
        # What this rule has remembered so far is of another run.
        memories = self.memories()
        for tensors in memories.values():
            tensors.clear()
        # Copies: the rule changes them in place, and the caller may go on with its own.
        for key in state:
            owner, _, name = key.partition("/")
            if owner in memories:
                parameter = self.parameters[name]
                shard = shard_of(state[key], parameter).to(parameter.device, copy=True)
                memories[owner][name] = sharded_as(shard, parameter)

    def memories(self) -> dict[str, dict[str, Tensor]]:
        """Returns what the parts remember from step to step, by what their keys begin with."""
        return {"direction": self.direction.state, "combine": self.combination.state}


def build_rule(
    model: GPT, optimizer: Optimizer, config: OptimConfig, schedule: Schedule
) -> Gradient:
    """Returns the rule that a configuration asks for; the plain gradient for path=none."""
    if config.path == "none":
        return Gradient(model)
    axes = {entry.name: getattr(config, entry.name) for entry in fields(RuleConfig)}
    axes |= {"start": schedule.first, "stop": schedule.stop}
    return SharpnessAware(model, optimizer, **axes)
