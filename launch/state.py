"""The state of a run: what its checkpoints hold, and how a run takes it over from one, its own or another's."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from conf.schema import Config
from data import Corpus
from launch import checkpoint, identity
from launch.plan import Plan
from launch.process import peak_flops
from model import GPT, checkpoint_path
from model.sharding import Layout, load_weights, reshard
from optim import Gradient, Schedule
from optim.adamw import load_state_tensors, state_tensors
from optim.perturbation import random_state, set_random_state


@dataclass
class Progress:
    """How far a run has come: with weights, optimiser and random state, all that the next step depends on."""

    step: int = 0
    tokens: int = 0  # counted targets trained on
    flops: int = 0  # of every pass, and of what rows measure: logit statistics, diagnostics
    forwards: float = 0.0  # passes over a step's batch
    backwards: float = 0.0
    seconds: float = 0.0  # spent in steps, over all starts
    perturbed: int = 0  # steps that moved the weights
    skipped: int = 0  # steps whose loss or gradient was not finite
    skipped_in_a_row: int = 0
    loss_sum: float = 0.0  # since the last row
    loss_tokens: int = 0
    logged: int = -1  # step of the last row
    evaluated: int = -1  # step of the last evaluation
    validation: dict[str, float] = field(default_factory=dict)  # what it found
    measured: dict[str, float] = field(default_factory=dict)  # what the rule found in the step that the next row tells of
    row: dict[str, Any] = field(default_factory=dict)  # of this step, not logged yet: it waits for the step's evaluation


class Interval:
    """What goes by from one row to the next, evaluations and saves left out: the speeds of a row are taken over it."""

    def __init__(self, progress: Progress, waited: float) -> None:
        self.began, self.first, self.waited = time.perf_counter(), replace(progress), waited

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Stops the clock."""
        began = time.perf_counter()
        yield
        self.began += time.perf_counter() - began

    def speeds(self, progress: Progress, waited: float, plan: Plan, recomputes: bool, device: torch.device) -> dict[str, float]:
        """Tokens a second and the share of time that `waited`, seconds of waiting for data, grew by; on GPUs their memory and, where their
        peak is known, the share of it that AdamW's passes would need (mfu) and that was executed, recomputed blocks included."""
        seconds = time.perf_counter() - self.began
        found = {"perf/tokens_per_second": (progress.tokens - self.first.tokens) / seconds, "perf/data_wait": (waited - self.waited) / seconds}
        if device.type == "cuda":
            found["perf/memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if peak := peak_flops(device):
            useful = plan.flops_per_step * (progress.step - self.first.step)
            recomputed = recomputes * (plan.forward.body + plan.forward.attention) * plan.tokens_per_step
            executed = progress.flops - self.first.flops + recomputed * (progress.backwards - self.first.backwards)
            found |= {"perf/mfu": useful / seconds / peak, "perf/hardware_mfu": executed / seconds / peak}
        return found


def tensors_of(model: GPT, optimizer: Optimizer, rule: Gradient, layout: Layout) -> dict[str, dict[str, Tensor]]:
    """What this process saves of the tensors that the next step depends on, by file and name: of sharded ones its shard; every process
    has a random state of its own."""
    reshard(model)
    tensors: dict[str, dict[str, Any]] = {"model": dict(model.named_parameters()), "optimizer": state_tensors(model, optimizer)}
    tensors["rule"] = rule.state_dict()
    mine = {file: {name: value for name, value in group.items() if layout.saves(value)} for file, group in tensors.items()}
    mine["random"] = {name + own(layout): value for name, value in random_state().items()}
    return mine


def own(layout: Layout) -> str:
    """What the names of a process's own tensors end on."""
    return f"/{layout.rank}" if layout.rank else ""


def restore(saved: checkpoint.Checkpoint, model: GPT, optimizer: Optimizer, rule: Gradient, corpus: Corpus, layout: Layout) -> Progress:
    """Takes over everything that the next step depends on. Raises ValueError where the data are others by now."""
    if saved.state["data"] != corpus.fingerprint:
        raise ValueError(f"the data have changed since {saved.path} was made; bring them back, or choose another dir")
    load_weights(model, saved.tensors["model"])
    load_state_tensors(model, optimizer, saved.tensors["optimizer"])
    random = saved.tensors["random"]
    state = {name: random[name + own(layout)][...] for name in ("cpu", "cuda") if name + own(layout) in random}
    if state:  # with more processes than there were, the new ones' streams begin anew
        set_random_state(state)
    if saved.tensors["rule"]:
        rule.load_state_dict(saved.tensors["rule"])
    return Progress(**saved.state["progress"])


def branch(settings: Config, model: GPT, optimizer: Optimizer, rule: Gradient, corpus: Corpus, layout: Layout, schedule: Schedule) -> Progress:
    """Starts from a checkpoint of another run: from its weights, and with init.optimizer from its optimiser, step and place in the data too.
    The rule, which may be another, starts without memory at that step.

    Raises ValueError where there is no such checkpoint, where it does not fit this model or these data, or lies beyond the horizon
    or past the beginning of what counts from there."""
    init, ours = settings.init, identity.canonical(settings)
    try:
        path = layout.agreed(checkpoint_path(init.run or "", init.step))  # that run may be under way
    except ValueError as error:
        raise ValueError(f"init.{error}") from None
    try:
        saved = checkpoint.load(path, layout=layout)
    except checkpoint.DamagedCheckpoint as error:
        raise ValueError(f"init.run={init.run}: {path} is damaged ({error}); choose another of its checkpoints with init.step") from None
    if saved.state["tokenizer"] != corpus.tokenizer.hash or saved.state["model"] != asdict(model.config):
        raise ValueError(f"init.run={init.run} has another shape or tokenizer; choose its model, tokenizer and data")
    if not init.optimizer:
        load_weights(model, saved.tensors["model"])
        return Progress()
    theirs = saved.state["identity"]
    if ours["optim.base"] != theirs.get("optim.base"):
        raise ValueError(f"optim.base={ours['optim.base']} differs from {theirs.get('optim.base')} in init.run, whose state it cannot take over; "
                         "keep it, or leave init.optimizer out")  # fmt: skip
    order = [key for key in ours if key == "seed" or key.startswith(("data.", "batch.sequences", "batch.length"))]
    if changed := [key for key in order if ours[key] != theirs.get(key)]:
        raise ValueError(f"{changed[0]}={ours[changed[0]]} differs from {theirs.get(changed[0])} in init.run; to go on in its data order, keep it")
    saved.tensors["rule"].clear()
    done = restore(saved, model, optimizer, rule, corpus, layout)
    rule.step = done.step
    optim = settings.optim
    unlike = theirs.get("optim.path") == "none" and schedule.first < min(done.step, schedule.stop)
    if unlike and (optim.compute_matched or optim.rho_schedule in ("warmup", "cosine")):
        key = "compute_matched=true" if optim.compute_matched else f"rho_schedule={optim.rho_schedule}"
        raise ValueError(f"optim.{key} counts from optim.start={optim.start:g}, and init.run moved nothing up to step {done.step}; "
                         f"set optim.start={done.step}")  # fmt: skip
    if done.step >= schedule.steps:
        raise ValueError(f"schedule.steps={schedule.steps} ends before step {done.step} of init.run; lengthen the run")
    return Progress(done.step, done.tokens, done.flops, done.forwards, done.backwards, done.seconds, done.perturbed, done.skipped)
