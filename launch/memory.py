"""What lives on one device at the fullest moment of a step, from shapes alone; python train.py
plan_only=true prints it.

Counted are the bytes of tensors, as torch.cuda.max_memory_allocated counts them; the context of
CUDA, NCCL's buffers and what the allocator holds without using it come on top. N tokens are in a
micro-batch of sequences of length T; D is the width, M that of the MLP, H the heads of width d, G
those of keys and values, V the padded vocabulary, s the bytes of a number in the compute precision.

A step has a few moments of which one is the fullest (`moments`), and each is a sum of parts. What a
layer keeps for its backward is derived operation by operation (`block`), for eager execution:
compiled blocks keep less, as inductor computes again what is cheap."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import NamedTuple

import torch
from torch import nn

from conf.schema import Config, ParallelConfig
from launch.config import micro_sequences, num_groups
from launch.process import choose_precision, num_processes
from model.chunked_head import BLOCK_ELEMENTS, CHUNK_ELEMENTS
from model.chunked_head import even_chunk_size as even
from model.gpt import GPT, QUERIES, SHORT, GPTConfig
from optim.axes import choose, needs_gradient, takes_ieee_passes, terms_of

Parts = Counter[str]  # bytes of what lives at a moment, by what it is; they add up
LOOKED_AT = 512  # tokens whose logits a logged row describes


class Block(NamedTuple):
    """Bytes per token of one transformer block: what its forward keeps, what its backward needs on
    top, and what lives in a forward that keeps nothing."""

    kept: int
    backward: int
    forward: int


def block(shape: GPTConfig, length: int, device: str, size: int) -> Block:
    """What autograd keeps of a block, s = `size`.

        norms        their inputs in fp32, 4 D each, which are the residuals; two statistics
                     (RMSNorm one)
        linear maps  their inputs, s D or s M; under autocast a cast of its own for each map that
        reads a norm's output
        attention    q, k and v as one, s (D + 2 G d); once more q and k where they are rotated or
                     normalised; its output s D and
                     the log-normalisers 4 H. Where scores are written out, copies of q, k, v and
                     their softmax: in bf16 on short sequences
                     on CPUs; and there with dropout, of all H T in fp32, with the noise and its
                     product as well
        MLP          both sides of the GELU or squared ReLU, 2 s M; for SwiGLU 4 s M: gate, silu, up
                     and their product
        dropout      a byte a number on CUDA; on CPUs the noise

    RMSNorm is not fused on CPUs, nor of heads in bf16: what it normalised is kept in fp32, and the
    fp32 copy of an input in bf16."""
    D, M, H, T, s = shape.width, shape.hidden_width, shape.num_heads, length, size
    kv, casts, cpu, drops = (
        shape.kv_heads * shape.head_width,
        size != 4,
        device == "cpu",
        shape.dropout > 0,
    )
    qk, qkv = D + kv, D + 2 * kv
    norm = (
        4 * D
        + (8 if shape.norm == "layernorm" else 4)
        + (4 * D if shape.norm == "rmsnorm" and cpu else 0)
    )
    dropped = drops * D * (s if cpu else 1)

    turned = shape.qk_norm or shape.positions == "rope"
    normed = shape.qk_norm * (
        4 * (H + shape.kv_heads) + (4 * qk * (1 + casts) if cpu or casts else 0)
    )
    if cpu and casts and not drops and kv == D and T <= SHORT:
        # that a query has scores of
        keys = (
            sum(min(QUERIES, T - begin) * min(T, begin + QUERIES) for begin in range(0, T, QUERIES))
            // T
        )
        core, core_backward = s * (4 * D + H * keys), s * (D + 2 * H * min(T, QUERIES))
    elif cpu and drops:
        core, core_backward = 4 * (3 * D + 3 * H * T) + s * D, 4 * (2 * D + 2 * H * T)
    else:
        core, core_backward = s * (qkv + turned * qk + D) + 4 * H, s * (D + 2 * qkv)
    attention = norm + s * D + normed + core + dropped

    maps = 2 if shape.activation == "swiglu" else 1
    mlp = (
        norm
        + s * D * (maps if casts else 1)
        + s * M * (4 if shape.activation == "swiglu" else 2)
        + dropped
    )
    mlp_backward = (
        4 * D + casts * s * D + s * M * {"gelu": 1, "swiglu": 2, "relu2": 3}[shape.activation]
    )
    forward = max(8 * D + s * (D + qkv) + core, 12 * D + s * D + s * M * (maps + 1))
    return Block(attention + mlp, max(mlp_backward, 4 * D + core_backward - mlp), forward)


@dataclass(frozen=True)
class Head:
    """The head over the `tokens` of a micro-batch (see model.logits.sweep), on a kind of device, s
    = `size`."""

    width: int
    V: int  # rows of the unembedding
    softcap: bool
    tokens: int
    device: str
    size: int

    @property
    def table(self) -> int:
        """Its numbers."""
        return self.V * self.width

    def sweep(self, stored: bool = False, rebuilt: bool = False, gradients: bool = True) -> int:
        """Bytes of a sweep: casts of h and W; a chunk of z, which turns into r block of rows by
        block of rows, unless r is `stored`; a block in fp32 and its softmax; dh; and dW with the
        product that is added to it."""
        N, s, casts = self.tokens, self.size, self.size != 4
        chunk = N if stored else even(N, max(1, CHUNK_ELEMENTS[self.device] // self.V))
        if rebuilt:
            chunk = even(N, max(chunk // 2, chunk - self.width))
        rows = min(chunk, max(1, BLOCK_ELEMENTS[self.device] // self.V))
        softmax = 4 * rows * self.V * (1 + casts + 2 * self.softcap)
        found = casts * s * (N * self.width + self.table) + (0 if stored else s * chunk * self.V)
        if not gradients:
            return found + softmax
        product, dW = s * self.table, 4 * self.table
        chunks = -(-N // chunk)
        first = max(softmax, product + casts * dW)  # in fp32 the first product becomes dW
        # the product of the chunk before is there until the next
        later = dW + product * (casts or chunks > 2) + max(softmax, product)
        return found + s * N * self.width + (first if chunks == 1 else later)


class Held(NamedTuple):
    """Numbers of parameters: in the shards of one process, of those that are perturbed, of the
    largest; and whole: the linear maps of a block, which FSDP gathers together, and the rest,
    tables and norms, which it gathers as the root."""

    shard: int
    moved: int
    largest: int
    block: int
    root: int

    def whole(self, num_layers: int) -> int:
        """Numbers of the whole model."""
        return num_layers * self.block + self.root


@cache
def held(shape: GPTConfig, pattern: str, shards: int) -> Held:
    """The parameters of a model in so many shards, each cut along its first dimension into parts of
    one size but for the last ones."""
    with torch.device("meta"):
        model = GPT(shape)
    parameters = dict(model.named_parameters())
    part = {name: -(-p.shape[0] // shards) * prod(p.shape[1:]) for name, p in parameters.items()}
    norms = {
        id(p)
        for module in model.modules()
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm))
        for p in module.parameters()
    }
    block = sum(p.numel() for p in model.blocks[0].parameters() if id(p) not in norms)
    moved = sum(part[name] for name in choose(model, parameters, pattern))
    return Held(
        sum(part.values()),
        moved,
        max(part.values()),
        block,
        sum(p.numel() for p in parameters.values()) - shape.num_layers * block,
    )


@dataclass(frozen=True)
class Passes:
    """Forwards and backwards over the micro-batches of a group on one process."""

    shape: GPTConfig
    held: Held
    body: Block
    head: Head
    micros: int
    checkpointing: bool
    parallel: ParallelConfig
    shards: int | None  # None without FSDP
    gathered_size: int  # bytes of a number of a block that FSDP gathers

    @property
    def gradients(self) -> int:
        """Bytes of all gradients as this process keeps them."""
        return 0 if self.parallel.cpu_offload else 4 * self.held.shard

    @property
    def staying(self) -> int:
        """Blocks that lie gathered after their forward."""
        return 0 if self.parallel.reshard_after_forward else self.shape.num_layers

    @property
    def waits(self) -> bool:
        """Whether gradients stay whole on each process until the last micro-batch."""
        return self.shards is not None and self.parallel.sync == "last" and self.micros > 1

    @property
    def casts(self) -> Parts:
        """The casts of weights that autocast keeps; there is nothing to cast where FSDP gathers in
        the compute precision."""
        casts = self.head.size == 2 and (self.shards is None or self.gathered_size == 4)
        return Parts({"casts of weights": 2 * self.shape.num_layers * self.held.block * casts})

    def gathered(self, blocks: int) -> Parts:
        """The root and so many blocks."""
        if self.shards is None:
            return Parts()
        return Parts(
            {"gathered": 4 * self.held.root + self.gathered_size * blocks * self.held.block}
        )

    def forward(self, live: Parts, gradients: bool) -> Parts:
        """A forward that keeps nothing, at its head, whose r may be spent on another point."""
        activations = 4 * self.head.tokens * self.shape.width
        sweep = self.head.sweep(rebuilt=gradients, gradients=gradients)
        return (
            live
            + self.casts
            + self.gathered(self.staying)
            + Parts({"activations": activations, "head": sweep})
        )

    def moments(
        self, live: Parts, before: int, logged: bool, sweep: int
    ) -> Iterator[tuple[str, Parts]]:
        """Forward, with so many bytes for the head's `sweep`, and backward, to gradients of
        `before`: of the first micro-batch, and of a later one, which finds all gradients there."""
        D, L, N, head = self.shape.width, self.shape.num_layers, self.head.tokens, self.head
        live = live + self.casts
        kept = N * (4 * D if self.checkpointing else self.body.kept)  # of a block
        # of the block whose backward runs
        inside = N * (self.body.backward + self.body.kept * self.checkpointing)
        # the last norm's output, and the noise of the embedding's dropout
        ends = 4 * N * D * (1 + (self.shape.dropout > 0))
        for later in (False, True)[: min(2, self.micros)]:
            known = (
                before + 4 * self.held.whole(L) * later
                if self.waits
                else max(before, self.gradients * later)
            )
            start = (
                live
                + self.gathered(self.staying)
                + Parts({"activations": L * kept + ends + 4 * N * D, "gradients": known})
            )
            yield "forward", start + Parts({"head": sweep})
            if logged and not later:  # z, log p, p and their product
                yield "forward", start + Parts({"head": 16 * min(N, LOOKED_AT) * head.V})
            if head.device == "cuda":  # both gradients times that of the loss
                yield "backward", start + Parts({"head": (head.size + 4) * N * D + 8 * head.table})
            for left in {L, max(1, L - 1), 1}:
                for grown, activations in (
                    (D * self.shape.hidden_width, left * kept + inside),
                    (self.held.block, (left - 1) * kept + 8 * N * D),
                ):
                    yield (
                        "backward",
                        live
                        + self.backward(left, grown, later, known)
                        + Parts({"activations": activations + ends}),
                    )
            yield "backward", live + self.end(later, known) + Parts({"activations": ends})

    def backward(self, left: int, grown: int, later: bool, known: int) -> Parts:
        """Beside activations: the backward of a block, with so many blocks `left`, and gradients of
        `grown` of its weights."""
        s, n, done = self.head.size, self.held, (self.shape.num_layers - left) * self.held.block
        if self.shards is None:
            # their casts were made in the first forward, so autograd comes to them last
            pending = s * done * (later and s == 2)
            found = Parts(
                {
                    "gradients": (
                        known + 4 * self.shape.width * self.shape.hidden_width + pending
                        if known
                        else 4 * (done + grown)
                    )
                }
            )
        else:
            reduced, blocks = (
                4 * n.block if done and not self.waits else 0,
                left if self.staying else min(left, 2),
            )
            grown *= self.gathered_size
            found = self.gathered(blocks) + Parts(
                {"gathered": reduced + grown, "gradients": known or self.share(done)}
            )
        return found + Parts({"head": 4 * self.head.table})

    def share(self, numbers: int) -> int:
        """Bytes of gradients of so many numbers of weights after the first backward, where there
        are shards."""
        return (
            4 * numbers
            if self.waits
            else 0
            if self.parallel.cpu_offload
            else 4 * numbers // (self.shards or 1)
        )

    def end(self, later: bool, known: int) -> Parts:
        """All gradients, and that of the embedding, which is dense, with what it is added to: the
        head's, out of place where the head is tied, and those of earlier micro-batches."""
        n, s, table = self.held, self.head.size, 4 * self.head.table
        if self.shards is None:
            pending = s * self.shape.num_layers * n.block * (later and s == 2)
            return Parts(
                {
                    "gradients": self.gradients + pending,
                    "head": table * (2 * self.shape.tied + bool(known)),
                }
            )
        reduced, blocks = (
            0 if self.waits else 4 * n.block,
            self.share(self.shape.num_layers * n.block),
        )
        return self.gathered(0) + Parts(
            {
                "gathered": reduced,
                "gradients": known or blocks,
                "head": (2 + self.shape.tied) * table,
            }
        )


def planned_device(config: Config) -> str:
    """The kind of device that a configuration is for, here or elsewhere."""
    return (
        "cuda"
        if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
        else "cpu"
    )


def planned_precision(config: Config) -> torch.dtype:
    """The precision there: a CUDA device that is elsewhere is taken to multiply bf16."""
    elsewhere = (
        planned_device(config) == "cuda"
        and not torch.cuda.is_available()
        and config.precision == "auto"
    )
    return (
        torch.bfloat16
        if elsewhere
        else choose_precision(config.precision, torch.device(planned_device(config)))
    )


def passes_of(config: Config, shape: GPTConfig, exact: bool = False) -> Passes:
    """The passes of a configuration, or those that it takes in IEEE fp32 (`exact`)."""
    optim, parallel, world, device = (
        config.optim,
        config.parallel,
        num_processes(config.parallel),
        planned_device(config),
    )
    moves = optim.path != "none"
    size = 4 if exact or (moves and optim.compute == "fp32") else planned_precision(config).itemsize
    shards = (
        None
        if parallel.name == "single"
        else world // (parallel.replicas if parallel.name == "hsdp" else 1)
    )
    micro = micro_sequences(config)
    return Passes(
        shape,
        held(shape, optim.parameters if moves else "all", shards or 1),
        block(shape, config.batch.length, device, size),
        Head(
            shape.width,
            shape.padded_vocab_size,
            shape.logit_softcap is not None,
            micro * config.batch.length,
            device,
            size,
        ),
        config.batch.sequences // (micro * world * num_groups(config)),
        config.activation_checkpointing,
        parallel,
        shards,
        4 if takes_ieee_passes(optim) else size,
    )


def moments(config: Config, shape: GPTConfig, logged: bool) -> Iterator[tuple[str, Parts]]:
    """The moments of a step that may be its fullest; optim.cotangent=auto counts as store.

    forward    activations and the head's sweep; on a logged row the logits that it describes
    backward   a block with the activations of those before it; at the end all gradients, and the
               embedding's own beside the head's
    probe      delta-SAM's noise and the clean weights beside a forward that keeps nothing
    move       the gradient, the direction, its metric's copy and the clean weights
    look       on a logged row: the move beside the clean weights and the gradients
    step       the gradients, and what stays

    With FSDP the root lies gathered during a pass; a block with the one gathered next to it, and
    its gradients whole, beside the fp32 copy that is reduced of the block after it."""
    optim, passes, n = (
        config.optim,
        passes_of(config, shape),
        0 if config.parallel.cpu_offload else 4,
    )
    P, moved = n * passes.held.shard, n * passes.held.moved
    # Muon: one a matrix
    states = {
        "adamw": 2 * P,
        "sgd": P * (optim.momentum > 0),
        "muon": 2 * P - 4 * shape.num_layers * passes.held.block,
    }
    always = Parts({"weights": P, "optimiser": states[optim.base]})
    if optim.path == "none":
        yield from passes.moments(always, 0, logged, passes.head.sweep())
        yield "step", always + Parts({"gradients": P})
        return

    terms, takes, grouped = terms_of(optim), needs_gradient(optim), num_groups(config) > 1
    store = bool(terms.functional) and optim.cotangent != "rebuild"
    rebuild = bool(terms.functional) and not store
    tokens, s = passes.micros * passes.head.tokens, passes.head.size
    h = s * tokens * shape.width
    always += Parts(
        {
            "memory of the rule": moved * (optim.direction in ("stale", "friendly")),
            "cotangents": s * tokens * passes.head.V * store,
        }
    )
    # LookSAM's g_v, until there is another
    before = always + Parts({"memory of the rule": P * (optim.combine == "reuse")})
    others = Parts({"gradients": P * grouped})  # of the groups before
    kept = Parts({"cotangents": h * (rebuild or terms.logit != 0)})
    if optim.weights == "delta":
        noise = moved * (1 if optim.delta_probe == "central" else 3)
        yield (
            "probe",
            passes_of(config, shape, exact=True).forward(
                before + others + Parts({"copies of the rule": noise + moved}), gradients=False
            ),
        )
    if takes:
        yield from passes.moments(before + kept, 0, logged, passes.head.sweep(stored=store))
        yield from passes.moments(before + kept + others, 0, False, passes.head.sweep(stored=store))
    made = moved * (optim.direction in ("friendly", "random")) + moved * (
        optim.metric != "euclidean"
    )
    yield (
        "move",
        always
        + kept
        + passes.casts
        + others
        + Parts({"gradients": P * takes, "copies of the rule": made + moved}),
    )

    clean = Parts({"copies of the rule": moved + P * (optim.combine != "replace")})
    whole = (
        s
        * passes.head.table
        * ((rebuild or terms.logit != 0) and (s == 2 or passes.shards is not None))
    )
    there, known = (
        always + clean + kept + Parts({"head": whole}),
        max(P * grouped, P * (terms.clean != 0)),
    )
    if terms.full or terms.functional:
        spent = Parts({"head": 4 * passes.head.table * (terms.logit != 0)})
        yield from passes.moments(
            there + spent,
            known,
            logged and not takes,
            passes.head.sweep(stored=store, rebuilt=rebuild),
        )
    if terms.logit:
        yield "forward", passes.forward(there + Parts({"gradients": known}), gradients=True)
    if logged:
        # one weight at a time; on CPUs blocks of it
        rounded = 5 * n * passes.held.largest * (passes.head.device == "cuda")
        e = moved * (not grouped and not terms.logit)
        yield (
            "look",
            always + clean + Parts({"gradients": P, "copies of the rule": max(e, rounded)}),
        )
    if terms.logit:
        # r~ times the clean W, and times the clean h
        spent = Parts({"cotangents": h, "head": 4 * passes.head.table})
        yield from passes.moments(always + spent, max(known, P * bool(terms.functional)), False, 0)
    yield "step", before + Parts({"gradients": P})


@dataclass(frozen=True)
class Estimate:
    """The fullest moment of a step: its name and its parts, in bytes."""

    moment: str
    parts: Parts

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return round(sum(self.parts.values()))


def estimate(config: Config, shape: GPTConfig, logged: bool = True) -> Estimate:
    """The fullest moment of a perturbed step of this configuration, which logs a row or does not,
    on one of its processes."""
    return max(
        (Estimate(*moment) for moment in moments(config, shape, logged)),
        key=lambda found: found.total,
    )
