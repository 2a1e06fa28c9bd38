"""Tables of the tensors that live in a forward and a backward over the micro-batches of a group on
one process, with FSDP or without.

With FSDP the root lies gathered during a pass; a block with the one gathered next to it, and its
gradients whole, beside the fp32 copy that is reduced of the block after it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import NamedTuple

import torch
from torch import nn

from conf.schema import ParallelConfig
from launch.plan.memory_layers import Block, Head, PerToken, of_tokens
from launch.plan.memory_table import Moment, Row, Table, tensor
from model.config import GPTConfig
from model.gpt import GPT
from optim.rule.parameters import choose

DESCRIBED_TOKENS = 512  # whose logits a logged row describes (model.logits.LazyLogits.statistics)


class ParameterCounts(NamedTuple):
    """Numbers of parameters. FSDP gathers the linear maps of a block together, and the rest, tables
    and norms, as the root."""

    shard: int  # of one process
    moved: int  # those of them that are perturbed
    largest: int  # of one parameter's shard
    block: int  # linear maps of a block, whole
    root: int  # the rest of the model, whole

    def whole(self, num_layers: int) -> int:
        """Returns the numbers of the whole model."""
        return num_layers * self.block + self.root


@cache
def parameter_counts(shape: GPTConfig, pattern: str, shards: int) -> ParameterCounts:
    """Counts the parameters of a model.

    Args:
        shape: of the model
        pattern: which parameters are perturbed (optim.parameters)
        shards: number of parts of one size, but for the last ones, into which each parameter is
            cut along its first dimension
    """
    with torch.device("meta"):
        model = GPT(shape)
    parameters = dict(model.named_parameters())
    part = {name: -(-p.shape[0] // shards) * prod(p.shape[1:]) for name, p in parameters.items()}
    # Norms are gathered with the root: in bf16 their perturbation would be rounded away.
    norms = set()
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            norms |= {id(p) for p in module.parameters()}
    block = sum(p.numel() for p in model.blocks[0].parameters() if id(p) not in norms)
    whole = sum(p.numel() for p in parameters.values())
    return ParameterCounts(
        shard=sum(part.values()),
        moved=sum(part[name] for name in choose(model, parameters, pattern)),
        largest=max(part.values()),
        block=block,
        root=whole - shape.num_layers * block,
    )


@dataclass(frozen=True)
class Passes:
    """Forwards and backwards over the micro-batches of a group on one process."""

    shape: GPTConfig
    counts: ParameterCounts
    block: Block
    head: Head
    micros: int
    checkpointing: bool
    parallel: ParallelConfig
    shards: int | None  # None without FSDP
    gathered_size: int  # bytes of a number of a block that FSDP gathers

    @property
    def tokens(self) -> int:
        """Returns N, the tokens of a micro-batch."""
        return self.head.tokens

    @property
    def gradients(self) -> int:
        """Returns the numbers of all gradients that this process keeps on its device."""
        if self.parallel.cpu_offload:
            return 0
        return self.counts.shard

    @property
    def staying(self) -> int:
        """Returns the blocks that lie gathered after their forward."""
        if self.parallel.reshard_after_forward:
            return 0
        return self.shape.num_layers

    @property
    def waits(self) -> bool:
        """Returns whether gradients stay whole on each process until the last micro-batch."""
        return self.shards is not None and self.parallel.sync == "last" and self.micros > 1

    @property
    def casts(self) -> Table:
        """Returns the casts of weights that autocast keeps; there is nothing to cast where FSDP
        gathers in the compute precision."""
        gathered_cast = self.shards is not None and self.gathered_size != 4
        if self.head.size != 2 or gathered_cast:
            return []
        L = self.shape.num_layers
        return tensor("casts of weights", "linear maps", L, self.counts.block, size=2)

    def gathered(self, blocks: int) -> Table:
        """Returns the root and some blocks, as FSDP gathers them."""
        if self.shards is None:
            return []
        root = tensor("gathered", "root: tables and norms", self.counts.root)
        return root + tensor(
            "gathered", "blocks", blocks, self.counts.block, size=self.gathered_size
        )

    def ends(self) -> Table:
        """Returns what is kept at either end of the body."""
        N, D = self.tokens, self.shape.width
        table = tensor("activations", "output of the last norm", N, D)
        if self.shape.dropout > 0:
            table += tensor("activations", "dropout of the embedding", N, D)
        return table

    def kept(self, attentions: int, mlps: int) -> Table:
        """Returns the tensors that the halves of some blocks keep, without activation
        checkpointing."""
        attention = of_tokens(self.block.attention(), attentions, self.tokens)
        return attention + of_tokens(self.block.mlp(), mlps, self.tokens)

    def kept_by_blocks(self, blocks: int) -> Table:
        """Returns the tensors that some blocks keep for their backward."""
        if self.checkpointing:
            block_input = PerToken("inputs of blocks", self.shape.width, 4)
            return of_tokens([block_input], blocks, self.tokens)
        return self.kept(blocks, blocks)

    def in_mlp_backward(self, left: int) -> Table:
        """Returns the activations where the backward is in the MLP of the last of `left` blocks."""
        table = of_tokens(self.block.mlp_backward(), 1, self.tokens)
        if self.checkpointing:
            # The block's forward has been run again.
            return self.kept_by_blocks(left) + self.kept(1, 1) + table
        return self.kept(left, left) + table

    def in_attention_backward(self, left: int) -> Table:
        """Returns the same in its attention: what its MLP had kept is gone."""
        table = of_tokens(self.block.attention_backward(), 1, self.tokens)
        if self.checkpointing:
            return self.kept_by_blocks(left) + self.kept(1, 0) + table
        return self.kept(left, left - 1) + table

    def at_end_of_block(self, left: int) -> Table:
        """Returns the same once its backward is over."""
        N, D = self.tokens, self.shape.width
        residuals = tensor("activations", "gradients of the residual", 2, N, D)
        return self.kept_by_blocks(left - 1) + residuals

    def forward(self, live: Table, gradients: bool) -> Table:
        """Returns a forward that keeps nothing, at its head, whose r may be multiplied with another
        point (`gradients`)."""
        hidden = tensor("activations", "hidden states", self.tokens, self.shape.width)
        head = self.head.tensors(rebuilt=gradients, gradients=gradients)
        return live + self.casts + self.gathered(self.staying) + hidden + head

    def moments(self, live: Table, before: int, logged: bool, head: Table) -> Iterator[Moment]:
        """Yields the moments of a forward and a backward: of the first micro-batch, and of a later
        one, which finds all gradients there.

        Args:
            live: what lives beside them
            before: numbers of gradients that are there before
            logged: whether logits are described
            head: what lives in the head
        """
        live = live + self.casts
        # All later micro-batches are alike, so the second stands for them.
        for later in (False, True)[: min(2, self.micros)]:
            known = before
            if later and self.waits:
                # Every process keeps its own sum of whole gradients until the last micro-batch.
                known = before + self.counts.whole(self.shape.num_layers)
            elif later:
                known = max(before, self.gradients)
            yield from self.forward_moments(live, known, logged and not later, head)
            yield from self.backward_moments(live, known, later)

    def forward_moments(
        self, live: Table, known: int, logged: bool, head: Table
    ) -> Iterator[Moment]:
        """Yields the end of a forward: the head, and what is computed around it."""
        N, D, V, s = self.tokens, self.shape.width, self.head.V, self.head.size
        start = live + self.gathered(self.staying) + self.kept_by_blocks(self.shape.num_layers)
        start += self.ends() + tensor("activations", "hidden states", N, D)
        start += tensor("gradients", "added up so far", known)
        yield "forward", start + head
        if logged:
            described = min(N, DESCRIBED_TOKENS)
            yield "forward", start + tensor("head", "z, log p, p and p log p", 4, described, V)
        if self.head.device == "cuda":
            # Both gradients are multiplied by that of the loss.
            scaled = tensor("head", "dh", N, D, size=s) + tensor("head", "dh, scaled", N, D)
            yield "backward", start + scaled + tensor("head", "dW, and scaled", 2, V, D)

    def backward_moments(self, live: Table, known: int, later: bool) -> Iterator[Moment]:
        """Yields a backward: within the first, second and last of its blocks, and at its end."""
        L = self.shape.num_layers
        matrix = self.shape.width * self.shape.hidden_width
        # What lives changes by the same from block to block, but for the first, after which there
        # are gradients on their way: one of these is the fullest.
        for left in {L, max(1, L - 1), 1}:
            within = live + self.of_weights(left, matrix, later, known)
            yield "backward", within + self.in_mlp_backward(left) + self.ends()
            yield "backward", within + self.in_attention_backward(left) + self.ends()
            after = live + self.of_weights(left, self.counts.block, later, known)
            yield "backward", after + self.at_end_of_block(left) + self.ends()
        yield "backward", live + self.end(later, known) + self.ends()

    def of_weights(self, left: int, grown: int, later: bool, known: int) -> Table:
        """Returns, beside activations, the backward of a block.

        Args:
            left: blocks whose backward is not over, this one among them
            grown: numbers of the gradients of its weights that are there
            later: whether it is a later micro-batch
            known: numbers of gradients that were there before
        """
        block = self.counts.block
        done = (self.shape.num_layers - left) * block
        head = tensor("head", "dW", self.head.V, self.shape.width)
        if self.shards is None and known:
            # A gradient of its own, until it is added.
            matrix = tensor("gradients", "of a matrix", self.shape.width, self.shape.hidden_width)
            table = tensor("gradients", "added up so far", known) + matrix
            return table + self.gradients_of_casts(done, later) + head
        if self.shards is None:
            return tensor("gradients", "of the blocks done", done + grown) + head
        # The block itself and the one before it, which FSDP gathers ahead.
        table = self.gathered(left if self.staying else min(left, 2))
        if done and not self.waits:
            # Those of the block after it, in fp32, on their way to the other processes.
            table += tensor("gathered", "gradients being reduced", block)
        table += tensor("gathered", "gradients of the block", grown, size=self.gathered_size)
        return table + self.gradients_so_far(known, done) + head

    def gradients_of_casts(self, done: int, later: bool) -> Table:
        """Returns the gradients of casts of weights: the casts were made in the first forward, so
        autograd comes to them last."""
        if self.head.size != 2 or not later:
            return []
        return tensor("gradients", "of casts", done, size=2)

    def gradients_so_far(self, known: int, numbers: int) -> Table:
        """Returns the gradients where there are shards: those known before, or of some weights
        after the first backward."""
        if known:
            return tensor("gradients", "added up so far", known)
        if self.waits:
            return tensor("gradients", "whole, of the blocks done", numbers)
        num_bytes = 4 * numbers // (self.shards or 1)
        if self.parallel.cpu_offload or not num_bytes:
            return []
        shape = f"{numbers:,} in {self.shards} shards, 4 B"
        return [Row("gradients", "shards, of the blocks done", shape, num_bytes)]

    def end(self, later: bool, known: int) -> Table:
        """Returns all gradients, and that of the embedding, which is dense, with what it is added
        to: the head's, out of place where the head is tied, and those of earlier micro-batches."""
        V, D = self.head.V, self.shape.width
        all_blocks = self.shape.num_layers * self.counts.block
        if self.shards is None:
            table = tensor("gradients", "all", self.gradients)
            table += self.gradients_of_casts(all_blocks, later)
            if self.shape.tied:
                table += tensor("head", "embedding's gradient, and with the head's", 2, V, D)
            if known:
                table += tensor("head", "embedding's gradient, added to earlier", V, D)
            return table
        table = self.gathered(0)
        if not self.waits:
            table += tensor("gathered", "gradients being reduced", self.counts.block)
        table += self.gradients_so_far(known, all_blocks)
        num_tables = 3 if self.shape.tied else 2
        return table + tensor("head", "gradients of embedding and head", num_tables, V, D)
