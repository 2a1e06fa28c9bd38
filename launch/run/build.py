"""Builds what a run trains: its data, and its model on the devices."""

import math
from dataclasses import dataclass

import torch

from conf.schema import Config
from data import Corpus, Loader, Validation, prepare
from launch.plan.plan import Plan
from launch.run.liveness import Liveness
from model import GPT
from model.parallelize import parallelize, shard
from model.processes import Layout
from optim.rule.axes import takes_ieee_passes

# Times parallel.timeout that may pass until the first step is done, which compiles.
FIRST_STEP_FACTOR = 6.0


@dataclass
class RunData:
    """The text of a run. Any batch is a pure function of (seed, step), so there is no position to
    save."""

    corpus: Corpus
    loader: Loader
    sets: dict[str, Validation]


def open_data(settings: Config, liveness: Liveness) -> RunData:
    """Returns the prepared data, which the main process prepares while the others wait."""
    liveness.report_phase("preparing data", timeout_factor=math.inf)
    # The others then find it prepared, and none does the work twice.
    liveness.layout.on_main(lambda: prepare(settings.data, settings.tokenizer))
    corpus = prepare(settings.data, settings.tokenizer)
    length = settings.batch.length
    loader = Loader(corpus.train, corpus.weights, length, settings.batch.sequences, settings.seed)
    sets = {
        name: Validation(tokens, length, corpus.tokenizer, settings.evaluation.tokens)
        for name, tokens in corpus.validation.items()
    }
    return RunData(corpus, loader, sets)


def build_model(
    settings: Config, plan: Plan, layout: Layout, device: torch.device, dtype: torch.dtype
) -> GPT:
    """Returns the model with its initial weights, in shards where the run has several processes.

    Args:
        settings: the run
        plan: the model's shape
        layout: the processes that share the model
        device: of this process
        dtype: in which the passes compute
    """
    # Shapes first; weights, or this process's shards of them, are drawn last, each from a
    # generator of its own.
    with torch.device("meta"):
        model = GPT(plan.model)
    parallelize(model, settings.compile, settings.activation_checkpointing, device)
    parallel = settings.parallel
    if layout.mesh is not None:
        # Passes in IEEE fp32 need weights that were gathered in fp32.
        in_half = dtype == torch.bfloat16 and not takes_ieee_passes(settings.optim)
        gathered = dtype if in_half else None
        shard(model, layout, parallel.reshard_after_forward, gathered, parallel.cpu_offload)
    # Each parameter has a generator of its own, so that shards on any number of processes are drawn
    # as the whole would be.
    offloads = layout.mesh is not None and parallel.cpu_offload
    model.to_empty(device=torch.device("cpu") if offloads else device)
    model.init_weights(settings.seed)
    return model
