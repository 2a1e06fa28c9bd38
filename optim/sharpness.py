"""The gradient of every sharpness-aware rule, as one rule with axes that combine.

batches -> rule.gradient -> p.grad -> clip -> base optimiser
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from conf.schema import DIRECTIONS, OptimConfig, RuleConfig
from model.gpt import GPT
from model.logits import compute_dtype
from model.sharding import (
    all_min,
    all_sum,
    gathered,
    local,
    shard_of,
    sharded_as,
    sharded_modules,
    summed,
)
from optim import delta
from optim.adapter import Adapter
from optim.axes import (
    Terms,
    check_optimizer,
    choose,
    kinds,
    make_axes,
    multiplied,
    needs_gradient,
    terms_of,
)
from optim.diagnostics import (
    clean_loss,
    decompose,
    look_at_move,
    measure_fidelity,
    warn_of_rounding,
)
from optim.direction import Direction, length, scaled
from optim.gradient import Gradient, Micro, RuleResult, cut, named_gradients, plus, take_gradients
from optim.perturbation import (
    dot,
    free_memory,
    ieee_fp32,
    moved,
    norm,
    random_state,
    rounds,
    same_buffers,
    set_random_state,
)
from optim.schedule import Schedule


class SharpnessAware(Gradient):
    """The gradient of every sharpness-aware rule: a point in the product of a few axes.

    Let t be the weights, L the loss summed over the counted tokens of the step and divided by their
    number N, r = dL/dF its derivative by the logits F, J = dF/dt, g = J^T r. A step moves the
    weights to t~ = t + e, looks there, moves them back, and leaves in p.grad

        full         J(t~)^T r(t~)     SAM (2010.01412): the gradient at t~
        functional   J(t~)^T r(t)      Functional-SAM (2502.02407): the output derivative stays
                     clean, so that only the curvature of
                                       the network counts, and not that of the loss over the logits
        logit        J(t)^T r(t~)      the other half of SAM
        angle        between the two:  J(t)^T [(1 - a - b) r + a r~] + b J(t~)^T r    (see
                     `optim.axes.terms_of`)

    The move is e = rho d / n(d), d = P q, over the perturbed parameters (`parameters`), each tied
    tensor once:

        direction    q: gradient (g of the ascent loss), momentum, stale, friendly, random
                     (`optim.direction`)
        metric       P: euclidean (1), adam (1 / (v^ power + eps)), adaptive (T^2)
                     (`optim.direction.scaled`)
                     n: |d|; for adam by choice |q| or sqrt(q.d); for adaptive |T q|
        weights      of the instances in the ascent loss: uniform, or delta
                     (`optim.delta`)
        scope        batch: one e for the whole batch. micro_batch (mSAM, 2302.09693): one for each
                     element of `batches`, and the
                     gradients at their t + e_i averaged by counted tokens. replica: one for what
                     each replica has of the batch
        ascent_fraction    the share of the group's instances, its first ones over all processes, on
                           which the ascent gradient is taken

    and afterwards g_rule may be combined with g:

        replace      g_rule
        orthogonal   g_rule - alpha (part of g orthogonal to g_rule)
                     GSAM (2203.08065)
        reuse        g_rule, and off the period g + alpha |g| / |g_v| g_v with the last g_v, the
                     part of g_rule orthogonal to g   LookSAM (2203.02714)

    `start`, `stop` (steps) and `period` say when; in between the plain gradient is taken. rho=0
    runs all passes and moves nothing. `rho` may be set anew before any step. The functional and
    angle paths keep r (`cotangent="store"`: tokens x vocabulary in the compute dtype) or rebuild it
    ("rebuild": one more head product, h and a number per token); "auto" stores while
    `cotangent_share` of the free memory allows.

    A sweep over the batch replays the random stream, so that every pass sees the same dropout masks
    and a step leaves the generator where a plain step does (but that a micro-batch which
    `ascent_fraction` cuts draws the masks of its two parts one after the other). Gradients are raw:
    clipping comes after, once. Norms are of fp32 or wider. Nothing is kept in the optimiser; what
    the next step depends on is in `state_dict`. Raises ValueError for an axis that does not exist,
    a value out of range, a combination that means nothing, and an optimiser that lacks what the
    axes read."""

    def __init__(self, model: GPT | Adapter | nn.Module, optimizer: Optimizer, **axes: Any) -> None:
        super().__init__(model)
        self.axes = make_axes({"path": "full"} | axes)
        if self.axes.start % 1 or (self.axes.stop or 0) % 1:
            raise ValueError(
                f"start={self.axes.start:g}, stop={self.axes.stop}: a fraction needs a horizon;"
                " give steps"
            )
        if self.axes.stop is not None and self.axes.stop <= self.axes.start:
            raise ValueError(
                f"stop={self.axes.stop:g} is not after start={self.axes.start:g}: the rule would"
                " never act; stop later"
            )
        self.optimizer, self.rho, self.step = optimizer, self.axes.rho, 0
        self.moving = choose(self.module, self.parameters, self.axes.parameters)
        self.kinds = kinds(self.module, self.parameters)
        self.multiplied = multiplied(self.module, self.parameters)
        check_optimizer(self.axes, optimizer, self.moving)
        self.direction: Direction = DIRECTIONS[self.axes.direction](self.axes, optimizer)
        # each process cuts its shards out of the same noise
        self.direction.seed = self.layout.collected(self.direction.seed)[0]
        self.direction.rows = self.module.unpadded_rows if isinstance(self.module, GPT) else {}
        self.terms = terms_of(self.axes)
        self.memory: dict[str, Tensor] = {}  # LookSAM's g_v
        self.room: dict[
            int, Tensor | None
        ] = {}  # of stored cotangents: fresh memory of this size would be paid for page by page
        self.stores: bool | None = {"store": True, "rebuild": False}.get(self.axes.cotangent)
        self.warned = False
        if self.axes.scope == "replica" and self.layout.replicas is None:
            raise ValueError(
                "scope=replica needs replicas, which a single process does not have; use"
                " scope=micro_batch or batch"
            )
        self.head: Tensor | None = getattr(self.module, "unembedding", None)
        self.told = type(self.direction).saw is not Direction.saw  # the direction wants to know g
        self.needs_gradient = needs_gradient(self.axes)
        # What is logged of g is had for free only where the ascent takes it, and its cosine with
        # g_rule where all of it is the move.
        self.ascends_plainly = self.axes.weights == "uniform" and self.axes.ascent_fraction == 1
        along_g = (
            self.ascends_plainly
            and self.axes.direction == "gradient"
            and self.axes.metric == "euclidean"
        )
        self.moves_along_g = along_g and len(self.moving) == len(self.parameters)

    def state_dict(self) -> dict[str, Tensor]:
        """The step, the seed of noise, the direction's memory, LookSAM's, and what cotangent=auto
        took: all that the next step depends on."""
        # torch does little with unsigned numbers of 64 bits
        signed = self.direction.seed - (self.direction.seed >> 63 << 64)
        state = {"step": torch.tensor(self.step), "seed": torch.tensor(signed)}
        state |= {} if self.stores is None else {"stores": torch.tensor(self.stores)}
        for owner, tensors in (("direction", self.direction.state), ("combine", self.memory)):
            state |= {f"{owner}/{name}": tensor for name, tensor in tensors.items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`; full tensors become this process's shards where the model is
        sharded."""
        self.step = int(state["step"])
        if "seed" in state:
            self.direction.seed = int(state["seed"]) % 2**64
        if "stores" in state and self.axes.cotangent == "auto":
            self.stores = bool(state["stores"])
        for owner, tensors in (("direction", self.direction.state), ("combine", self.memory)):
            tensors.clear()
            names = (name for name in state if name.startswith(f"{owner}/"))
            for name in names:
                parameter = self.parameters[name.partition("/")[2]]
                tensors[name.partition("/")[2]] = sharded_as(
                    shard_of(state[name], parameter).to(parameter.device, copy=True), parameter
                )

    def active(self, step: int) -> bool:
        """Whether the weights are moved in a step, counted from 0."""
        return self.within(step) and (step - self.axes.start) % self.axes.period == 0

    def within(self, step: int) -> bool:
        """Whether a step lies from `start` to before `stop`."""
        return self.axes.start <= step < (math.inf if self.axes.stop is None else self.axes.stop)

    def gradient(
        self, batches: Sequence[Any], logged: bool = True, diagnose: bool = False
    ) -> RuleResult:
        """Leaves the rule's gradient in p.grad, which must be empty, averaged over all counted
        tokens, and returns what the step was.

        `batches`: the micro-batches (inputs, targets) of the step; with scope=micro_batch each
        element is one group, and may be a list of micro-batches. The caller's autocast holds.
        `logged=False` spares the metrics; `diagnose` adds those that cost passes. Weights, their
        addresses and buffers are afterwards what a plain step would leave, even where a pass
        raises."""
        result = RuleResult()
        groups = self.groups(batches, result)
        if self.axes.scope != "micro_batch":
            groups = [[micro for group in groups for micro in group]]
        if self.axes.scope == "replica":
            self.count_tokens(groups[0], self.add)
        step, self.step, self.direction.step = self.step, self.step + 1, self.step
        clean: dict[str, Tensor] = {}  # g, where somebody wants it at the end
        if not self.active(step):
            self.plain([micro for group in groups for micro in group], result, logged)
            clean = named_gradients(self.parameters) if self.told else {}
        else:
            result.metrics["sharpness/rho"] = self.rho
            with ieee_fp32(self.device) if self.axes.compute == "fp32" else nullcontext():
                if diagnose:
                    decompose(self, groups[0], result)
                    measure_fidelity(self, groups[0], result)
                # Every group, so that the random stream ends where a plain step leaves it.
                result.finite = all(
                    [
                        self.one_group(group, result, self.terms, clean, logged, diagnose)
                        for group in groups
                    ]
                )
        self.add_up(result)
        if result.finite:
            self.conclude(step, clean, result, logged)
            warn_of_rounding(self, result)
        else:
            take_gradients(self.parameters)
        return result

    def one_group(
        self,
        group: list[Micro],
        result: RuleResult,
        terms: Terms,
        clean: dict[str, Tensor] | None,
        logged: bool,
        diagnose: bool,
    ) -> bool:
        """Adds the gradient of one group, at a moved point of its own, to p.grad, and g to `clean`
        if somebody wants it. False where the ascent is not finite. Without `clean` nothing is
        remembered of the step."""
        tokens, q = (
            sum(micro.tokens for micro in group),
            {} if self.direction.needs_gradient else self.along({}),
        )
        # replicas go on together, an empty one without a move
        counted = result.tokens if self.axes.scope == "replica" else tokens
        if counted == 0 or not (
            self.direction.needs_gradient or q
        ):  # nothing counted, or nothing to move along yet
            self.plain(group, result, logged)
            return True
        random, weight, earlier, gradients = (
            random_state(),
            tokens / result.tokens,
            take_gradients(self.parameters),
            {},
        )
        looked = bool(self.needs_gradient or terms.functional or terms.logit)
        if looked:
            if self.axes.ascent_fraction < 1:
                group = cut(group, self.axes.ascent_fraction, *self.sizes(group))
                self.count_tokens(group, self.add)
            with self.layout.apart() if self.axes.scope == "replica" else nullcontext():
                gradients = self.clean_pass(group, terms, weight, result, random, logged)
        elif diagnose:
            clean_loss(self, group, result, random)
        q = q or self.along(gradients)
        moving = [self.moving[name] for name in q]
        d = scaled(
            self.axes, self.optimizer, moving, list(q.values()), [gradients.get(name) for name in q]
        )
        n = length(self.axes, d, list(q.values())).item()
        if any(
            self.layout.collected(not math.isfinite(n))
            if self.axes.scope == "replica"
            else [not math.isfinite(n)]
        ):
            return False
        radius = self.rho * float(norm(d)) / n if logged and n > 0 else 0.0
        if logged and gradients and self.ascends_plainly:
            pairs = [
                (one, gradients[name]) for name, one in zip(q, d, strict=True) if name in gradients
            ]
            slope = (
                dot([one for one, _ in pairs], [own for _, own in pairs])
                / norm(d).clamp_min(1e-30)
                * self.direction.sign
            )
            del pairs  # they are let go of below
            self.log(
                result,
                weight,
                {
                    "sharpness/gradient_norm": norm(list(gradients.values())),
                    "sharpness/slope": slope,
                },
            )
        if clean is not None:
            self.keep(clean, gradients, list(q), weight)
        with same_buffers(self.module) if looked else nullcontext():
            with moved(
                moving, d, self.direction.sign * self.rho / n if n > 0 else 0.0, self.module
            ) as copies:
                for name, p in self.parameters.items():  # what the moved pass adds to
                    p.grad = earlier.get(name)
                    if terms.clean and name in gradients:
                        own = (
                            gradients[name]
                            if self.axes.combine == "replace"
                            else gradients[name].clone()
                        )
                        p.grad = self.whole(own.mul_(terms.clean * weight)).add_(
                            0 if p.grad is None else p.grad
                        )
                for held in (earlier, gradients, q, d):
                    held.clear()
                result.perturbed = True
                self.moved_pass(
                    group,
                    terms,
                    dict(zip(map(id, moving), copies, strict=True)),
                    weight,
                    result,
                    random,
                    logged,
                    diagnose,
                )
                if logged and moving:
                    look_at_move(self, moving, copies, radius, terms, weight, result)
            copies.clear()
            if terms.logit:
                set_random_state(random)
                for micro in group:
                    self.backward(
                        terms.logit * self.model.lazy_logits(micro.inputs).pull(micro.spent),
                        micro is group[-1],
                    )
                    result.count(micro.share, forwards=1, backwards=1)
                    micro.spent.free()
        return True

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

    def along(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """q of every parameter that moves, by name."""
        q: dict[str, Tensor] = {}
        for name, parameter in self.moving.items():
            if not self.direction.needs_gradient or name in gradients:
                along = self.direction(name, parameter, gradients.get(name))
                q |= {name: along} if along is not None else {}
        return q

    def clean_pass(
        self,
        group: list[Micro],
        terms: Terms,
        weight: float,
        result: RuleResult,
        random: dict[str, Tensor],
        logged: bool,
    ) -> dict[str, Tensor]:
        """The clean losses and cotangents of a group, and the gradient of its mean ascent loss if
        that is wanted."""
        axes, tokens = self.axes, max(1, sum(micro.tokens for micro in group))
        counted = torch.stack([micro.counted_B.count_nonzero() for micro in group]).sum()
        if axes.weights == "delta" and int(self.add(counted)) > 1:  # one instance weighs 1
            centres: list[Any] = [None] * len(group)
            rough = rounds(self.device)
            with same_buffers(self.module), ieee_fp32(self.device):
                offsets = delta.probe(
                    axes,
                    self.module,
                    self.moving,
                    self.direction,
                    lambda: self.instance_losses(group, result, random),
                )
                if rough:  # c would be a difference between losses of two precisions
                    centres = self.instance_losses(group, result, random)
            for micro, offsets_B, centres_B in zip(group, offsets, centres, strict=True):
                micro.offsets_B = offsets_B
                micro.centres_B = centres_B
        store = bool(terms.functional) and self.store(group)
        keep_h = bool(terms.logit or (terms.functional and not store))
        set_random_state(random)
        last = [micro for micro in group if micro.ascends][-1]
        for turn, micro in enumerate(group):
            trained = self.needs_gradient and micro.ascends > 0
            with torch.set_grad_enabled(trained):
                logits = self.model.lazy_logits(micro.inputs)
                self.look(logits, micro, result, logged)
                weighs = micro.ascends and (
                    micro.offsets_B is not None or micro.chosen_B is not None
                )
                weigh = partial(self.ascent_weights, micro) if weighs else None
                loss, micro.cotangent = logits.cross_entropy_and_cotangent(
                    micro.targets, 1 / tokens, store, keep_h, weigh, self.room.get(turn)
                )
                if store:
                    self.room[turn] = micro.cotangent.r_NxV
                if trained:
                    self.backward(loss, micro is last)
            # what other processes need of this pass is padding
            share = micro.ascends if trained else 0
            result.count(micro.share, forwards=1, backwards=share, head_products=1 + 2 * share)
            result.loss = plus(result.loss, loss * weight)
        found = take_gradients(self.parameters)
        mass = float(sum(micro.tokens for micro in group if micro.ascends))
        if any(micro.cotangent.weights_B is not None for micro in group):
            weighted = [
                micro.counted_B
                * (1 if micro.cotangent.weights_B is None else micro.cotangent.weights_B)
                for micro in group
                if micro.ascends
            ]
            mass = float(self.add(torch.cat(weighted).double().sum()))
        for micro in group:
            if micro.cotangent.weights_B is not None and mass:
                micro.weights_B = micro.cotangent.weights_B * (tokens / mass)
        if found and mass not in (
            0,
            tokens,
        ):  # the mean over what ascends, each instance with its weight
            torch._foreach_mul_(list(found.values()), tokens / mass)
        return found

    def ascent_weights(self, micro: Micro, which: slice, losses_b: Tensor) -> Tensor:
        """The weights in the ascent loss, up to a factor, of some instances of a micro-batch whose
        mean losses are given."""
        weights_b = torch.ones_like(losses_b)
        if micro.offsets_B is not None:
            weights_b = delta.weigh(
                self.axes,
                micro.offsets_B,
                which,
                losses_b if micro.centres_B is None else micro.centres_B[which],
            )
        return weights_b if micro.chosen_B is None else weights_b * micro.chosen_B[which]

    def sizes(self, group: list[Micro]) -> tuple[list[list[int]], int]:
        """The instances of each micro-batch on each of the processes that share one perturbation,
        and the place of this one among them."""
        place, world = 0, 1
        if self.axes.scope == "replica":
            place, world = self.layout.mesh.get_local_rank(), self.layout.mesh.size()
        elif sharded_modules(self.module):
            place, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        sizes_KxP = group[0].targets.new_zeros(len(group), world, dtype=torch.int64)
        sizes_KxP[:, place] = torch.tensor([len(micro.targets) for micro in group])
        return self.add(sizes_KxP).tolist(), place

    def moved_pass(
        self,
        group: list[Micro],
        terms: Terms,
        saved: dict[int, Tensor],
        weight: float,
        result: RuleResult,
        random: dict[str, Tensor],
        logged: bool,
        diagnose: bool,
    ) -> None:
        """Adds to p.grad what is to be had at the moved point. `saved` are the clean weights, by
        the identity of their parameters."""
        scale, dW_VxD, clean_head = 1 / result.tokens, None, None
        if self.head is not None and (terms.logit or (terms.functional and not self.stores)):
            shard_vxD = saved.get(id(self.head), local(self.head)).to(self.device)
            clean_head = gathered(shard_vxD.to(compute_dtype(shard_vxD)), self.head)
        set_random_state(random)
        for micro in group:
            with torch.set_grad_enabled(bool(terms.full or terms.functional)):
                logits, loss = self.model.lazy_logits(micro.inputs), None
                self.look(logits, micro, result, logged)
                result.count(micro.share, forwards=1)
                if terms.full:
                    weights_B = micro.weights_B if self.axes.delta_descent == "reweighted" else None
                    weigh = None if weights_B is None else lambda which, _, w=weights_B: w[which]
                    loss, _ = logits.cross_entropy_and_cotangent(micro.targets, scale, weigh=weigh)
                    self.backward(loss, micro is group[-1])
                    result.count(micro.share, backwards=1, head_products=3)
                if terms.logit:
                    loss, micro.spent = logits.spend(
                        micro.targets, scale, micro.cotangent.h_NxD, clean_head
                    )
                    result.count(micro.share, head_products=3)
                    if micro.spent.dW_VxD is not None:
                        dW_VxD = (
                            micro.spent.dW_VxD
                            if dW_VxD is None
                            else dW_VxD.add_(micro.spent.dW_VxD)
                        )
                        micro.spent.dW_VxD = None
                elif diagnose and not terms.full:
                    with torch.no_grad():
                        loss, _ = logits.cross_entropy_and_cotangent(micro.targets, scale)
                    result.count(micro.share, head_products=1)
                if terms.functional:
                    self.backward(
                        terms.functional * weight * logits.pull(micro.cotangent, clean_head),
                        micro is group[-1],
                    )
                    result.count(
                        micro.share,
                        backwards=1,
                        head_products=3 if micro.cotangent.r_NxV is None else 2,
                    )
            if loss is not None:
                result.perturbed_loss = plus(result.perturbed_loss, loss)
            if terms != Terms(full=1):
                micro.cotangent.free()
        if terms.logit:
            group[0].spent.dW_VxD = dW_VxD  # of all micro-batches: the first pull hands it on

    def keep(
        self,
        clean: dict[str, Tensor],
        gradients: dict[str, Tensor],
        moving: list[str],
        weight: float,
    ) -> None:
        """Adds up g over the groups where somebody wants it. With one group the direction is told
        at once, so that g can be let go of."""
        whole = weight == 1 and self.axes.scope != "replica"
        if self.told and whole and self.axes.combine == "replace":
            self.direction.saw({name: gradients[name] for name in moving if name in gradients})
        elif self.told or self.axes.combine != "replace":
            self.memory = {}  # there will be a new one
            for name, gradient in gradients.items():
                own = gradient if whole else self.whole(gradient * weight)
                clean[name] = clean[name].add_(own) if name in clean else own

    def add(self, values: Tensor) -> Tensor:
        """Values added up over the processes that share one perturbation."""
        return (
            summed(values, list(self.moving.values()))
            if self.axes.scope == "replica"
            else all_sum(self.module, values)
        )

    def whole(self, gradient: Tensor) -> Tensor:
        """A part of the gradient that was kept within its replica, added up over the replicas in
        place."""
        if self.axes.scope == "replica":
            self.layout.sum_over_replicas(local(gradient))
        return gradient

    def log(self, result: RuleResult, weight: float, metrics: dict[str, Any]) -> None:
        """Logs metrics of a move, to be averaged over the groups, or over the replicas, by their
        weights."""
        if self.axes.scope == "replica":
            values = torch.tensor(
                [weight * float(value) for value in metrics.values()],
                dtype=torch.float64,
                device=self.device,
            )
            self.layout.sum_over_replicas(values)
            metrics, weight = dict(zip(metrics, values.tolist(), strict=True)), 1.0
        result.log(weight, metrics)

    def store(self, group: list[Micro]) -> bool:
        """Whether the cotangents of a group are stored; cotangent=auto decides once."""
        if self.stores is None:
            dense, axes = isinstance(self.model, Adapter), self.axes
            bytes_ = 0 if dense else self.cotangent_bytes(group)
            free = all_min(self.module, free_memory(self.device))
            self.stores = dense or bytes_ <= axes.cotangent_share * free
            if not dense:
                self.say(
                    f"cotangent=auto takes {'store' if self.stores else 'rebuild'}:"
                    f" {bytes_ / 2**20:,.0f} MiB to store, {free / 2**20:,.0f} MiB free, of which a"
                    f" share of {axes.cotangent_share:g} may be filled"
                )
        return self.stores

    def cotangent_bytes(self, group: list[Micro]) -> int:
        """What it takes to store r of a group, tokens x vocabulary in the compute dtype."""
        head = self.model.unembedding
        return (
            sum(micro.targets.numel() for micro in group)
            * head.shape[0]
            * compute_dtype(head).itemsize
        )

    def instance_losses(
        self, group: list[Micro], result: RuleResult, random: dict[str, Tensor]
    ) -> list[Tensor]:
        """One forward over a group: the mean loss of every instance."""
        set_random_state(random)
        for micro in group:
            result.count(micro.share, forwards=1, head_products=1)
        with torch.no_grad():
            return [
                self.model.lazy_logits(micro.inputs).instance_losses(micro.targets)
                for micro in group
            ]

    def conclude(
        self, step: int, clean: dict[str, Tensor], result: RuleResult, logged: bool
    ) -> None:
        """Combines g_rule with g, lets the direction know of both, and logs how they lie to each
        other."""
        remembers = type(self.direction).gave is not Direction.gave
        combine = self.axes.combine
        if not (logged or remembers or clean or combine == "reuse"):
            return
        rule = named_gradients(self.parameters)
        size = norm(list(rule.values()))
        if not size.isfinite():
            return
        if self.told and clean:
            self.direction.saw({name: clean[name] for name in self.moving if name in clean})
        if self.active(step) and clean:
            for name in clean.keys() - rule.keys():
                rule[name] = self.parameters[name].grad = torch.zeros_like(clean[name])
            g, g_rule = list(clean.values()), [rule[name] for name in clean]
            clean_size, inner = norm(g), dot(g, g_rule)
            if combine == "orthogonal":  # g_rule - alpha (g - part of g along g_rule)
                torch._foreach_mul_(
                    g_rule, 1 + self.axes.alpha * float(inner) / max(float(size) ** 2, 1e-60)
                )
                torch._foreach_add_(g_rule, g, alpha=-self.axes.alpha)
                inner, size = dot(g, g_rule), norm(g_rule)
            if combine == "reuse":  # g_v = g_rule - part of g_rule along g, in g's memory
                torch._foreach_mul_(g, -float(inner) / max(float(clean_size) ** 2, 1e-60))
                torch._foreach_add_(g, g_rule)
                self.memory = dict(clean) if self.rho else {}  # at radius 0 nothing but rounding
            result.metrics["sharpness/cosine"] = inner / (clean_size * size).clamp_min(1e-30)
        elif combine == "reuse" and self.memory and self.within(step):
            reused = [self.memory[name] for name in rule if name in self.memory]
            factor = float(self.axes.alpha * size / norm(reused).clamp_min(1e-30))
            torch._foreach_add_(
                [rule[name] for name in rule if name in self.memory], reused, alpha=factor
            )
        elif logged and "sharpness/rule_slope" in result.metrics and self.moves_along_g:
            result.metrics["sharpness/cosine"] = result.metrics[
                "sharpness/rule_slope"
            ] / size.clamp_min(1e-30)
        if remembers:
            self.direction.gave(
                {
                    name: gradient
                    for name, gradient in named_gradients(self.parameters).items()
                    if name in self.moving
                }
            )
        if logged:
            result.metrics["sharpness/rule_norm"] = norm(
                list(named_gradients(self.parameters).values())
            )
            if result.perturbed_loss is not None:
                clean_loss = (
                    result.metrics.get("sharpness/clean_loss")
                    if result.loss is None
                    else result.loss
                )
                result.metrics["sharpness/perturbed_loss"] = result.perturbed_loss
                if clean_loss is not None:
                    result.metrics["sharpness/gap"] = result.perturbed_loss - clean_loss


def build_rule(
    model: GPT, optimizer: Optimizer, config: OptimConfig, schedule: Schedule
) -> Gradient:
    """The rule that a configuration asks for; the plain gradient for path=none."""
    if config.path == "none":
        return Gradient(model)
    axes = {entry.name: getattr(config, entry.name) for entry in fields(RuleConfig)}
    return SharpnessAware(
        model, optimizer, **(axes | {"start": schedule.first, "stop": schedule.stop})
    )
