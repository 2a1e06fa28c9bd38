"""Trains a decoder-only language model: python train.py [KEY=VALUE ...]; python train.py help=true
lists every key.

The story of a run: derive the plan, claim the run folder, open the data, build the model, pick up
the newest checkpoint, then

    batches -> gradient rule -> p.grad -> clip -> base optimiser

step by step, with evaluations, rows and checkpoints in between. Started again it goes on where the
checkpoint stands, and ends with the weights of a run that never stopped."""

import math
import shlex
import time
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_

from conf.exit_codes import EXIT_DIVERGED, EXIT_PREEMPTED
from conf.output import harmless_output
from conf.ranks import rank_and_world
from conf.schema import Config
from data import Loader, Prefetcher, Validation, prepare, training_sample, unigram_bigram
from data.cache import check as check_data
from data.files import remove_temporary
from launch import config
from launch.checkpoint import step_folder
from launch.checkpoint.replicated import refuse_divergence, replicated
from launch.checkpoint.resume import (
    State,
    branch,
    checksum_of_weights,
    refuse_other_places,
    resume,
    tensors_of,
)
from launch.checkpoint.saver import Saver
from launch.evaluate import evaluate
from launch.plan.plan import Plan, describe, describe_memory, make_plan, refuse_here
from launch.run import identity
from launch.run.folder import FILES, read_rows, read_summary
from launch.run.liveness import Liveness
from launch.run.lock import RunLock
from launch.run.preemption import Preemption
from launch.run.process_group import processes, refuse_copies
from launch.run.snapshot import snapshot_code
from launch.run.watchdog import Watchdog
from launch.track.console import Console
from launch.track.meter import Interval, Progress
from launch.track.tracker import Silent, Tracker, loss_at_flops, send_rest
from model import GPT, load
from model.device import (
    autocast,
    choose_device,
    choose_precision,
    keep_freed_memory,
    profiler,
    seed_everything,
)
from model.hf import start_from
from model.parallelize import parallelize, shard
from model.processes import Layout
from model.sample import Sampling, decode_stream, generate
from model.sharding import full_norm
from optim import build_optimizer, build_rule
from optim.adamw import describe_groups
from optim.axes import takes_ieee_passes

FIRST = 6.0  # times parallel.timeout that may pass until the first step is done: it compiles


@harmless_output()
def main(settings: Config) -> int:
    """One run, from its configuration to the exit code of the process."""
    plan = make_plan(settings)
    name = identity.run_name(settings)
    if settings.plan_only:
        check_data(settings.data, settings.tokenizer, settings.batch.length)
        print(describe(settings, plan, name), describe_memory(settings, plan), sep="\n\n")
        return 0
    refuse_copies(settings.parallel)
    refuse_here(settings, plan)
    folder = Path(settings.dir or f"runs/{name}")
    with ExitStack() as stack:
        layout = Layout(*rank_and_world())
        watchdog = stack.enter_context(Watchdog(folder, layout, settings.parallel.timeout))
        liveness = watchdog.liveness
        device = choose_device(settings.device)
        stack.enter_context(processes(settings.parallel, device, layout, liveness))
        lock = RunLock(folder)
        layout.on_main(
            lambda: stack.enter_context(lock),
            lambda: identity.refuse_another(folder, settings),
            lambda: read_summary(folder),
        )
        if layout.agreed((folder / "summary.json").exists()):
            layout.on_main(
                lambda: refuse_other_places(folder, settings),
                lambda: print(
                    f"finished already: {folder}/summary.json has its figures; another seed or dir"
                    " starts another run"
                ),
                lambda: send_rest(folder, settings.tracking, name, identity.as_read(settings)),
            )
            return 0
        stack.enter_context(watchdog.heartbeats())
        layout.on_main(lambda: clear(folder))
        # a mistake that shows only here leaves nothing behind, and a signal ends it at once
        run = Run(settings, plan, name, folder, lock, liveness)
        stack.callback(run.saver.close)
        run.compare()
        layout.on_main(lambda: identity.claim(folder, settings), lambda: snapshot_code(folder))
        run.preemption = stack.enter_context(Preemption(settings.minutes))
        return run.train()


def clear(folder: Path) -> None:
    """Removes what killed starts left half written in the run folder, which this process holds."""
    step_folder.remove_partial(folder)
    remove_temporary(folder, FILES)
    remove_temporary(folder / "code")


class Run:
    """A run under way."""

    preemption: Preemption

    def __init__(
        self,
        settings: Config,
        plan: Plan,
        name: str,
        folder: Path,
        lock: RunLock,
        liveness: Liveness,
    ) -> None:
        layout = liveness.layout
        self.settings, self.plan, self.name, self.layout = settings, plan, name, layout
        self.liveness = liveness
        self.folder = folder
        self.lock = lock
        self.device = choose_device(settings.device)
        self.dtype = choose_precision(settings.precision, self.device)
        seed_everything(settings.seed, layout.rank, settings.deterministic)
        if self.device.type == "cpu":
            keep_freed_memory()

        # Data: any batch is a pure function of (seed, step), so there is no position to save.
        batch = settings.batch
        liveness.report_phase("preparing data", timeout_factor=math.inf)
        # the others find it prepared
        layout.on_main(lambda: prepare(settings.data, settings.tokenizer))
        self.corpus = prepare(settings.data, settings.tokenizer)
        self.micro = plan.micro
        self.loader = Loader(
            self.corpus.train, self.corpus.weights, batch.length, batch.sequences, settings.seed
        )
        self.sets = {
            key: Validation(tokens, batch.length, self.corpus.tokenizer, settings.evaluation.tokens)
            for key, tokens in self.corpus.validation.items()
        }

        liveness.report_phase("building the model", timeout_factor=FIRST)
        # Shapes first; weights, or this process's shards of them, are drawn last, each from a
        # generator of its own.
        with torch.device("meta"):
            self.model = GPT(plan.model)
        parallelize(self.model, settings.compile, settings.activation_checkpointing, self.device)
        parallel, home = settings.parallel, self.device
        if layout.mesh is not None:
            gathered = (
                self.dtype
                if self.dtype == torch.bfloat16 and not takes_ieee_passes(settings.optim)
                else None
            )
            shard(
                self.model, layout, parallel.reshard_after_forward, gathered, parallel.cpu_offload
            )
            home = torch.device("cpu") if parallel.cpu_offload else home
        self.model.to_empty(device=home)
        self.model.init_weights(settings.seed)
        self.optimizer = build_optimizer(self.model, settings.optim)
        self.rule = build_rule(self.model, self.optimizer, settings.optim, plan.schedule)
        self.progress = Progress()
        self.said = ""  # where it goes on from
        self.began_from: str | None = None  # a checksum
        self.resumed: State | None = None
        self.saver = Saver(folder, layout)
        if found := resume(
            folder, settings, self.model, self.optimizer, self.rule, self.corpus, layout
        ):
            path, self.resumed = found
            self.progress = self.resumed.progress
            self.began_from = self.resumed.origin
            self.said = f"resumed from {path}"
        elif settings.init.run:
            parent, self.progress = branch(
                settings, self.model, self.optimizer, self.rule, self.corpus, layout, plan.schedule
            )
            self.said = f"branched from {parent.path}"
            self.began_from = parent.checksum
        elif settings.init.hf:
            start_from(self.model, settings.init.hf, self.corpus.tokenizer)
            self.said = f"started from the weights of {settings.init.hf}"
            self.began_from = checksum_of_weights(settings.init.hf) if layout.main else None
        self.start = self.progress.step

    def announce(self) -> None:
        """Opens the logs and says what will be trained."""
        plan, settings = self.plan, self.settings
        console = Console(plan.schedule.steps, plan.evaluation_every)
        logged = self.progress.logged
        wandb_id = self.resumed.wandb_id if self.resumed else None
        counted = self.resumed.rows if self.resumed else None
        self.tracker: Tracker | Silent = Silent()
        if self.layout.main:
            self.tracker = Tracker(
                self.folder,
                settings.tracking,
                self.name,
                identity.as_read(settings),
                wandb_id,
                console,
                logged,
                counted,
            )
        say = self.rule.say = self.tracker.message
        say(
            f"{self.name}: {plan.num_parameters:,} parameters, {plan.num_non_embedding:,} without"
            f" embeddings; {plan.schedule.steps:,} steps of {plan.tokens_per_step:,} tokens on"
            f" {self.layout.world} x {self.device.type} in {str(self.dtype).removeprefix('torch.')}"
        )
        say(describe_groups(self.optimizer))
        if self.said:
            say(self.said)
        length, longest = settings.batch.length, self.model.config.max_length
        if 4 * length <= longest:
            say(
                f"note: batch.length={length} is far below model.max_length={longest}: no sequence"
                f" is longer, so positions from {length} on stay untrained;"
                f" model.max_length={length} fits"
            )

    def train(self) -> int:
        """Steps, evaluates, logs and saves until the horizon, or until somebody asks to stop;
        returns the exit code."""
        self.announce()
        self.model.train()
        progress, steps, code = self.progress, self.plan.schedule.steps, 0
        self.prefetcher = Prefetcher(self.loader, progress.step, pin=self.device.type == "cuda")
        self.interval = Interval(progress, self.prefetcher.seconds_waiting)
        profile = (
            profiler(self.folder / "trace.json")
            if self.settings.profile and self.layout.main
            else None
        )
        while True:
            self.evaluate_if_due()
            stopping = (
                self.layout.agreed(self.preemption.requested)
                if progress.step < steps or self.evaluation_due()
                else None
            )
            if progress.row and not self.evaluation_due():
                self.log()
            if self.saver.done:
                self.end_save()
            if self.checkpoint_due(bool(stopping)):
                self.save(needed=bool(stopping) or progress.step == steps)
            if stopping:
                self.tracker.message(
                    f"{stopping}: saved step {progress.step}; the same command goes on from there"
                )
                code = EXIT_PREEMPTED
            if stopping or progress.step == steps:
                break
            self.step()
            if progress.skipped_in_a_row >= self.settings.max_skipped:
                self.tracker.message(
                    f"error: {progress.skipped_in_a_row} steps in a row were not finite"
                    f" (max_skipped), up to batch {progress.step - 1}; the last checkpoint is"
                    " intact; lower optim.lr or look at the data"
                )
                code = EXIT_DIVERGED
                break
            if profile:
                profile.step()
        if profile:
            profile.stop()
        self.prefetcher.close()
        self.end_save()
        if code == 0:
            self.finish()
        self.tracker.close(code)
        return code

    def step(self) -> None:
        """One optimiser step. A loss or gradient that is not finite leaves weights and optimiser as
        they are."""
        progress, optim = self.progress, self.settings.optim
        began = time.perf_counter()
        # Groups, then micro-batches, then processes: each takes its part of every micro-batch.
        mine = slice(self.layout.rank, None, self.layout.world)
        parts = zip(
            *(half_BxT.split(self.micro)[mine] for half_BxT in self.prefetcher.next()), strict=True
        )
        micros = [tuple(half.to(self.device, non_blocking=True) for half in part) for part in parts]
        size = len(micros) // self.plan.num_groups  # of a group that is perturbed on its own
        batches = [micros[first : first + size] for first in range(0, len(micros), size)]
        self.liveness.report_phase(
            "training", progress.step, FIRST if progress.step == self.start else 1.0
        )
        lr, self.rule.rho = (
            self.plan.schedule.lr(progress.step),
            self.plan.schedule.radius(progress.step),
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr

        self.optimizer.zero_grad(set_to_none=True)
        row, measured, diagnosed = self.row_of(progress.step)
        with self.autocast():
            result = self.rule.gradient(batches, measured, diagnosed)
        norm = (
            full_norm(clip_grad_norm_(self.model.parameters(), optim.clip or math.inf))
            if result.finite
            else math.nan
        )
        seen = result.perturbed_loss if result.loss is None else result.loss
        loss = math.nan if seen is None else seen.item()
        if math.isfinite(loss) and math.isfinite(norm):
            self.optimizer.step()
            progress.skipped_in_a_row = 0
            if result.loss is not None:
                progress.loss_sum += loss * result.tokens
                progress.loss_tokens += result.tokens
        else:
            progress.skipped += 1
            progress.skipped_in_a_row += 1
            self.tracker.message(
                f"skipped batch {progress.step}: loss {loss}, gradient norm {norm}"
            )

        progress.step += 1
        progress.tokens += result.tokens
        progress.forwards += result.forwards
        progress.backwards += result.backwards
        progress.perturbed += result.perturbed
        flops = self.plan.forward.of(result.forwards, result.backwards, result.head_products)
        progress.flops += round(flops * self.plan.tokens_per_step)
        progress.seconds += time.perf_counter() - began
        if measured:
            progress.measured = {name: float(value) for name, value in result.metrics.items()}
        if progress.step == row:
            self.make_row(lr, norm)

    def row_of(self, step: int) -> tuple[int, bool, bool]:
        """The step whose row tells of the update from `step`; whether this update's figures go into
        it, those of the last one that moves the weights, or else of the last; and whether
        diagnostics that cost passes belong to them."""
        schedule, every, diagnostics = (
            self.plan.schedule,
            self.plan.tracking_every,
            self.settings.optim.diagnostics_every,
        )
        first = step // every * every
        row = min(first + every, schedule.steps)
        told = max((other for other in range(first, row) if schedule.moves(other)), default=row - 1)
        diagnosed = False
        if (
            diagnostics and step == told and schedule.moves(told)
        ):  # the first row with a move since a multiple of so many rows
            before = next(
                (other // every + 1 for other in range(first - 1, -1, -1) if schedule.moves(other)),
                0,
            )
            diagnosed = (first // every + 1) // diagnostics > before // diagnostics
        return row, step == told, diagnosed

    def make_row(self, lr: float, norm: float) -> None:
        """What is logged of this step: means and speeds are taken since the last row."""
        progress = self.progress
        progress.row = {
            "train/loss": (
                progress.loss_sum / progress.loss_tokens if progress.loss_tokens else None
            ),
            "optim/lr": lr,
            "grad/norm": norm,
            "skipped": progress.skipped,
            **progress.measured,
            **self.interval.speeds(
                progress,
                self.prefetcher.seconds_waiting,
                self.plan,
                self.settings.activation_checkpointing,
                self.device,
                self.layout.world,
            ),
        }
        progress.loss_sum, progress.loss_tokens, progress.measured = 0.0, 0, {}
        self.interval = Interval(progress, self.prefetcher.seconds_waiting)

    def evaluation_due(self) -> bool:
        """At the first step, at every interval and at the end, once."""
        step, done = self.progress.step, self.progress.evaluated
        return done < 0 or (
            step not in (done, self.progress.logged)
            and (step % self.plan.evaluation_every == 0 or step == self.plan.schedule.steps)
        )

    def evaluate_if_due(self) -> None:
        """Evaluates; asked to stop meanwhile, it leaves that to the next start."""
        if not self.evaluation_due():
            return
        self.liveness.report_phase(
            "evaluating", self.progress.step, FIRST if self.progress.step == self.start else 1.0
        )
        with self.interval.pause():
            found = evaluate(
                self.model,
                self.sets,
                self.micro,
                self.autocast,
                lambda: bool(self.preemption.requested),
                self.layout,
            )
        if found is not None:
            self.progress.evaluated, self.progress.validation = self.progress.step, found
            self.progress.row |= found

    def log(self) -> None:
        """Logs the row of this step with how far the run has come."""
        progress = self.progress
        counts = {
            name: getattr(progress, name)
            for name in ("step", "tokens", "flops", "forwards", "backwards", "seconds")
        }
        self.tracker.log(counts | progress.row)
        progress.row, progress.logged = {}, progress.step

    def checkpoint_due(self, stopping: bool) -> bool:
        """At every interval, at milestones, at a stop and at the end. What this start was restored
        from is never written again: a kill meanwhile would lose it."""
        step = self.progress.step
        at_interval = step % self.plan.checkpoint_every == 0 and step != self.start
        restored = self.resumed is not None and step == self.start
        return not restored and (
            stopping
            or at_interval
            or step in (self.plan.schedule.steps, *self.settings.checkpoint.milestones)
        )

    def save(self, needed: bool) -> None:
        """Begins to save a checkpoint once the one before is on disk, and waits for it if it is
        `needed`."""
        settings = self.settings
        state = State(
            step=self.progress.step,
            progress=self.progress,
            model=asdict(self.model.config),
            tokenizer=self.corpus.tokenizer.hash,
            data=self.corpus.fingerprint,
            identity=identity.canonical(settings),
            wandb_id=self.tracker.wandb_id,
            rows=self.tracker.counted,
            origin=self.began_from,
        )
        self.liveness.report_phase("saving", self.progress.step)
        with self.interval.pause():
            self.end_save()
            self.layout.on_main(self.lock.refuse_moved)
            self.compare()
            self.tracker.sync()
            tensors = tensors_of(self.model, self.optimizer, self.rule, self.layout)
            self.saver.begin(
                tensors,
                asdict(state),
                self.corpus.tokenizer,
                settings.checkpoint.keep,
                settings.checkpoint.milestones,
            )
            if needed:
                self.end_save(needed)

    def end_save(self, needed: bool = False) -> None:
        """Waits for the save under way. Where the disk refused it, the run goes on with a warning,
        unless the checkpoint is `needed`."""
        step, error = self.saver.step, self.saver.wait()
        if error and needed:
            raise ValueError(
                f"step {step} could not be saved ({error}); make room on the disk of {self.folder}"
                " and start the same command again: it goes on from the checkpoint before"
            )
        if error:
            self.tracker.message(
                f"warning: step {step} could not be saved ({error}); the checkpoints before it are"
                " intact"
            )

    def compare(self) -> None:
        """Refuses to go on where the processes do not hold the same."""
        plan, settings = (
            self.plan,
            identity.canonical(self.settings) | asdict(self.settings.parallel),
        )
        settings |= {
            name: getattr(plan, name)
            for name in ("evaluation_every", "checkpoint_every", "tracking_every", "micro")
        }
        values = replicated(settings, self.corpus, self.progress, self.optimizer, self.rule)
        refuse_divergence(self.layout, values, self.model, self.optimizer, self.rule)

    def finish(self) -> None:
        """Writes the summary, and prints what the run came to."""
        progress, settings, say = self.progress, self.settings, self.tracker.message
        self.liveness.report_phase("finishing", progress.step, math.inf)
        self.layout.on_main(self.lock.refuse_moved)
        summary = {
            "name": self.name,
            "step": progress.step,
            "tokens": progress.tokens,
            "flops": progress.flops,
            "seconds": progress.seconds,
            "parameters": self.plan.num_parameters,
            "non_embedding": self.plan.num_non_embedding,
            "skipped": progress.skipped,
            "perturbed_steps": progress.perturbed,
            **progress.validation,
        }
        if self.layout.main:
            adamw = self.plan.flops_per_step * self.plan.schedule.steps
            # a matched run ends at that budget
            budget = math.inf if settings.optim.compute_matched else adamw
            summary["val/loss_at_equal_flops"] = loss_at_flops(
                read_rows(self.folder / "metrics.jsonl"), budget
            )
        baselines = ""
        if settings.evaluation.baselines and self.layout.main:
            first = next(iter(self.sets.values()))
            counted = training_sample(self.corpus.train, self.corpus.weights)
            unigram, bigram = unigram_bigram(counted, first, self.corpus.tokenizer.vocab_size)
            summary |= {"baseline/unigram": unigram, "baseline/bigram": bigram}
            baselines = f"beside it: bigram {bigram:.4f}, unigram {unigram:.4f}"
        self.tracker.summary(summary)  # before anything is shown: from here on the run is done
        loss, bits = progress.validation["val/loss"], progress.validation["val/bits_per_byte"]
        say(
            f"validation loss {loss:.4f} nats per token, {bits:.4f} bits per byte, after"
            f" {progress.tokens:,} tokens in {progress.seconds:.0f} s"
        )
        if baselines:
            say(baselines)
        if settings.evaluation.sample and self.layout.main:
            # what others will load, and free of compilation
            trained = load(self.folder).to(self.device)
            with self.autocast():
                tokens = generate(
                    trained,
                    self.corpus.tokenizer.prompt(""),
                    settings.evaluation.sample,
                    Sampling(temperature=0.8, seed=settings.seed),
                )
                text = "".join(decode_stream(tokens, self.corpus.tokenizer.decode_bytes))
            # a terminal would obey control characters
            text = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
            say("a sample:\n" + "\n".join(f"    {line}" for line in text.splitlines()))
        say(
            f"run folder: {self.folder}\ntry next:\n    python -m model.sample run={self.folder}"
            f" prompt={shlex.quote(self.opening())}\n    python -m launch.evaluate"
            f" run={self.folder}"
        )

    def opening(self) -> str:
        """Returns how the text of the first validation set begins: a prompt that fits the
        corpus."""
        validation, tokenizer = next(iter(self.sets.values())), self.corpus.tokenizer
        ids = validation.source.read(0, 64)
        text = tokenizer.decode(ids[~np.isin(ids, [tokenizer.eot, *tokenizer.bos])])
        words = "".join(c if c.isprintable() and c != "\ufffd" else " " for c in text).split()
        return " ".join(words[1:3] or words)[:40]  # the first word may be cut

    def autocast(self) -> AbstractContextManager:
        """The run's compute precision."""
        return autocast(self.device, self.dtype)


if __name__ == "__main__":
    config.main(main)
