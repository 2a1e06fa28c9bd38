"""The state of a run: what its checkpoints hold, and how a run takes it over from one, its own or
another's."""

import hashlib
import json
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from conf.schema import Config
from data import Corpus, prepare
from data.files import check
from data.hf_folder import find_folder
from launch.checkpoint.step_folder import use_newest
from launch.run import identity
from launch.run.folder import counted_lines, load_config
from launch.run.opening import OpenRun
from launch.track.progress import Progress, Start, State
from launch.track.tracker import send_rest
from model import GPT
from model.checkpoint import (
    PLACES,
    TENSORS,
    Checkpoint,
    DamagedCheckpoint,
    checkpoints,
    describe,
    differing,
    open_run,
    read_state,
    refuse_other_run,
    together,
)
from model.hf import WEIGHTS, start_from
from model.processes import Layout
from model.sharding import load_weights, reshard
from optim import Gradient, Schedule
from optim.adamw import load_state_tensors, state_tensors
from optim.rule.conditions import random_state, set_random_state

# The counters that a branch goes on with.
CARRIED = ("step", "tokens", "flops", "forwards", "backwards", "seconds", "perturbed", "skipped")


@dataclass
class Trained:
    """What a run trains, and with what: all that its checkpoints are made of and restore."""

    model: GPT
    optimizer: Optimizer
    rule: Gradient
    corpus: Corpus
    layout: Layout


def resume_or_start(folder: Path, settings: Config, trained: Trained, schedule: Schedule) -> Start:
    """Goes on from the newest checkpoint of a run; else begins from another run, from the weights
    of a Hugging Face folder, or from scratch.

    Raises ValueError as `resume` and `branch` do."""
    if found := resume(folder, settings, trained):
        path, state = found
        return Start(state.progress, f"resumed from {path}", state.origin, state)
    if settings.init.run:
        parent, progress = branch(settings, trained, schedule)
        return Start(progress, f"branched from {parent.path}", parent.checksum)
    if weights := settings.init.hf:
        start_from(trained.model, weights, trained.corpus.tokenizer)
        origin = checksum_of_weights(weights) if trained.layout.main else None
        return Start(note=f"started from the weights of {weights}", origin=origin)
    return Start()


def tensors_of(
    model: GPT, optimizer: Optimizer, rule: Gradient, layout: Layout
) -> dict[str, dict[str, Tensor]]:
    """Returns what this process saves of the tensors that the next step depends on, by file and
    name: of sharded ones its shard; every process has a random state of its own."""
    # With FSDP the parameters of the root may lie gathered, where shards are to be saved.
    reshard(model)
    tensors: dict[str, dict[str, Any]] = {
        "model": dict(model.named_parameters()),
        "optimizer": state_tensors(model, optimizer),
    }
    tensors["rule"] = rule.state_dict()
    mine = {
        file: {name: value for name, value in group.items() if layout.writes_to_checkpoint(value)}
        for file, group in tensors.items()
    }
    mine["random"] = {name + own(layout): value for name, value in random_state().items()}
    return mine


def own(layout: Layout) -> str:
    """Returns the ending of the names of a process's own tensors."""
    return f"/{layout.rank}" if layout.rank else ""


def resume(
    folder: Path, settings: Config, trained: Trained, warn: Callable[[str], Any] = print
) -> tuple[Path, State] | None:
    """Takes over the newest usable checkpoint of a run, and returns its folder and state; None
    where there is none yet.

    Raises ValueError where the data are others by now, where all checkpoints are damaged or another
    run's, and where metrics.jsonl lacks rows that the checkpoint counts."""

    # Called for the newest checkpoint, and for the one before where it raises DamagedFile.
    def take(saved: Checkpoint) -> tuple[Path, State]:
        found = found_elsewhere(state_of(saved), settings, trained.corpus, trained.layout)
        refuse_other_run(saved, asdict(settings), found)
        return saved.path, restore(saved, trained)

    resumed = use_newest(folder, take, trained.layout, warn)
    if resumed:
        # Checked before the run begins: the tracker cuts the file to these rows.
        state = resumed[1]
        trained.layout.on_main(
            lambda: counted_lines(folder / "metrics.jsonl", state.progress.logged, state.rows)
        )
    return resumed


def state_of(saved: Checkpoint) -> State:
    """Returns the plain values of a checkpoint. Raises DamagedFile where they are of other
    types."""
    return check(saved.state, State, saved.path / "state.json")


def found_elsewhere(state: State, settings: Config, corpus: Corpus, layout: Layout) -> set[str]:
    """Returns the keys of PLACES whose paths may differ from those in a checkpoint: what lies there
    now is what it was made with."""
    found = set()
    # Text and tokenizer are open already, and the fingerprints of what was found are known.
    if state.data == corpus.fingerprint:
        found |= {name for name in PLACES if name.startswith("data.")}
    if state.tokenizer == corpus.tokenizer.hash:
        found.add("tokenizer.path")
    # A parent is known by the checksum that this run's checkpoints have noted of it.
    for name, ours in (("init.run", settings.init.run), ("init.hf", settings.init.hf)):
        moved = ours is not None and state.identity.get(name) not in (None, ours)
        # Looked at by the main process alone: it may be much to read.
        if (
            moved
            and state.origin
            and layout.any_rank(layout.main and state.origin in origins(name, ours))
        ):
            found.add(name)
    return found


def confirm_finished(opened: OpenRun, settings: Config) -> None:
    """Says that a run is done, once it is sure that it is this one, and sends W&B what it lacks of
    it."""
    folder = opened.folder
    opened.layout.on_main(
        lambda: refuse_other_places(folder, settings),
        lambda: print(
            f"finished already: {folder}/summary.json has its figures; another seed or dir starts"
            " another run"
        ),
        lambda: send_rest(folder, settings.tracking, opened.name, identity.as_read(settings)),
    )


def refuse_other_places(run: Path, settings: Config) -> None:
    """Raises ValueError where a finished run was given other paths than its own, and what lies
    there is not what it was trained with. The main process alone looks."""
    if identity.canonical(load_config(run)) == identity.canonical(settings):
        return
    saved = open_run(run, None, ())
    state = state_of(saved)
    corpus = prepare(settings.data, settings.tokenizer)
    found = found_elsewhere(state, settings, corpus, Layout())
    if changed := differing(state.identity, asdict(settings), found):
        raise identity.another(run, changed)


def origins(name: str, place: str | None) -> Collection[str]:
    """Returns the checksums of what a run can begin from at a place: of all checkpoints of an
    init.run, or of the weights of an init.hf."""
    if name == "init.hf":
        return {checksum_of_weights(str(place))}
    found = set()
    for path in checkpoints(Path(str(place))).values():
        with suppress(OSError, ValueError):
            found.add(read_state(path)["checksum"])
    return found


def checksum_of_weights(name_or_dir: str) -> str:
    """Returns the sha256 of the weights of a Hugging Face folder or hub name."""
    # Names count, too: the same tensors, split over other files, pass for other weights.
    files = sorted(find_folder(name_or_dir, WEIGHTS).glob("*.safetensors"))
    return hashlib.sha256(
        json.dumps([(file.name, *describe(file)) for file in files]).encode()
    ).hexdigest()


def restore(saved: Checkpoint, trained: Trained) -> State:
    """Takes over everything that the next step depends on. Raises DamagedFile, on all processes,
    for a checkpoint that does not fit, and ValueError where the data or the tokenizer are others by
    now."""
    # The order of the data is a function of (seed, step), so the same data are all it takes to go
    # on where the run stopped.
    state, corpus = state_of(saved), trained.corpus
    if state.data != corpus.fingerprint:
        raise ValueError(
            f"the data have changed since {saved.path} was made; bring them back, or choose"
            " another dir"
        )
    if state.tokenizer != corpus.tokenizer.hash:
        raise ValueError(
            f"the tokenizer has changed since {saved.path} was made; bring it back, or choose"
            " another dir"
        )
    refuse_other_shapes(saved, trained.model)

    def load() -> None:
        """Reads weights, optimiser, rule and random state of this process."""
        load_weights(trained.model, saved.tensors["model"])
        load_state_tensors(trained.model, trained.optimizer, saved.tensors["optimizer"])
        random, suffix = saved.tensors["random"], own(trained.layout)
        mine = {
            name: random[name + suffix][...] for name in ("cpu", "cuda") if name + suffix in random
        }
        # With more processes than there were, the streams of the new ones begin anew.
        if mine:
            set_random_state(mine)
        if saved.tensors["rule"]:
            trained.rule.load_state_dict(saved.tensors["rule"])

    together(trained.layout, load)
    return state


def refuse_other_shapes(saved: Checkpoint, model: GPT) -> None:
    """Raises DamagedCheckpoint where tensors are not those of this model, before any of its own is
    touched."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name in shapes.keys() ^ saved.tensors["model"].keys():
        raise DamagedCheckpoint(f"its weights are of another model, by {name}")
    # (name of the tensor, parameter whose shape it must have, tensor): optimiser state goes by
    # "<parameter>.<key>", memory of the rule by "<kind>/<parameter>". Numbers have no shape.
    named = [(name, name, value) for name, value in saved.tensors["model"].items()]
    named += [
        (name, name.rpartition(".")[0], value)
        for name, value in saved.tensors["optimizer"].items()
        if value.shape
    ]
    named += [
        (name, name.partition("/")[2], value)
        for name, value in saved.tensors["rule"].items()
        if value.shape
    ]
    for name, parameter, value in named:
        if value.shape != shapes.get(parameter):
            raise DamagedCheckpoint(
                f"{name} has the shape {list(value.shape)}, not that of the model"
            )


def branch(settings: Config, trained: Trained, schedule: Schedule) -> tuple[Checkpoint, Progress]:
    """Starts from a checkpoint of another run: from its weights, and with init.optimizer from its
    optimiser, step and place in the data too. The rule, which may be another, starts without memory
    at that step.

    Raises ValueError where there is no such checkpoint, where it does not fit this model or these
    data, or lies beyond the horizon or past the beginning of what counts from there."""
    init, model, corpus, layout = settings.init, trained.model, trained.corpus, trained.layout
    try:
        saved = open_run(init.run or "", init.step, TENSORS, layout, "init.step")
    except ValueError as error:
        raise ValueError(f"init.run={init.run}: {error}") from None
    state = state_of(saved)
    if state.tokenizer != corpus.tokenizer.hash or state.model != asdict(model.config):
        raise ValueError(
            f"init.run={init.run} has another shape or tokenizer; choose its model, tokenizer and"
            " data"
        )
    # With the weights alone everything begins anew, at step 0.
    if not init.optimizer:
        refuse_other_shapes(saved, model)
        together(layout, lambda: load_weights(model, saved.tensors["model"]))
        return saved, Progress()
    # Else the run goes on in the parent's data, at its step; its rule may be another, and would
    # misread what that one remembers.
    refuse_other_order(state, settings, corpus, layout)
    saved.tensors["rule"].clear()
    done = restore(saved, trained).progress
    trained.rule.step = done.step
    refuse_other_horizon(state, settings, schedule)
    # The counters go on; rows and evaluations begin anew.
    return saved, Progress(**{name: getattr(done, name) for name in CARRIED})


def refuse_other_order(state: State, settings: Config, corpus: Corpus, layout: Layout) -> None:
    """Raises ValueError where a run would take over an optimiser of another kind than its own, or
    go on in another order of the data."""
    # AdamW's moments mean nothing to Muon or SGD.
    ours, theirs = identity.canonical(settings), state.identity
    if ours["optim.base"] != theirs.get("optim.base"):
        raise ValueError(
            f"optim.base={ours['optim.base']} differs from {theirs.get('optim.base')} in init.run,"
            " whose state it cannot take over; keep it, or leave init.optimizer out"
        )
    # The keys that decide which tokens are in the batch of a step.
    order = {
        key: value
        for key, value in theirs.items()
        if key == "seed" or key.startswith(("data.", "batch.sequences", "batch.length"))
    }
    elsewhere = found_elsewhere(state, settings, corpus, layout)
    if changed := differing(order, asdict(settings), elsewhere):
        key, (before, now) = next(iter(changed.items()))
        raise ValueError(
            f"{key}={now} differs from {before} in init.run; to go on in its data order, keep it"
        )


def refuse_other_horizon(state: State, settings: Config, schedule: Schedule) -> None:
    """Raises ValueError where a run would begin beyond its horizon, or past the beginning of what
    counts from the first perturbed step."""
    optim, step = settings.optim, state.progress.step
    # A radius schedule and the budget of FLOPs count from optim.start. Where the parent moved
    # nothing although this run's schedule says that it did, they would count steps that never were.
    was_plain = state.identity.get("optim.path") == "none"
    counts_from = optim.compute_matched or optim.rho_schedule in ("warmup", "cosine")
    if was_plain and counts_from and schedule.first < min(step, schedule.stop):
        key = f"rho_schedule={optim.rho_schedule}"
        if optim.compute_matched:
            key = "compute_matched=true"
        raise ValueError(
            f"optim.{key} counts from optim.start={optim.start:g}, and init.run moved nothing up to"
            f" step {step}; set optim.start={step}"
        )
    if step >= schedule.steps:
        raise ValueError(
            f"schedule.steps={schedule.steps} ends before step {step} of init.run; lengthen the run"
        )
