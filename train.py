"""Trains a decoder-only language model: python train.py [KEY=VALUE ...]; python train.py help=true
lists every key.

The story of a run: derive the plan, open the run folder, open the data, build the model, pick up
the newest checkpoint, then

    batches -> gradient rule -> p.grad -> clip -> base optimiser

step by step, with evaluations, rows and checkpoints in between. Started again it goes on where the
checkpoint stands, and ends with the weights of a run that never stopped."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing

from torch.nn.utils import clip_grad_norm_

from conf.exit_codes import EXIT_DIVERGED, EXIT_PREEMPTED
from conf.output import harmless_output
from conf.schema import Config
from data import Prefetcher
from data.checks import check_data
from launch import config
from launch.checkpoint.checkpoints import Checkpoints
from launch.checkpoint.resume import Trained, confirm_finished, resume_or_start
from launch.evaluate import evaluate
from launch.plan.batch import part_of
from launch.plan.description import describe, describe_memory
from launch.plan.plan import Plan, make_plan, refuse_too_large_for_machine
from launch.run import identity
from launch.run.build import FIRST_STEP_FACTOR, build_model, open_data
from launch.run.opening import OpenRun, open_run_folder
from launch.run.preemption import Preemption
from launch.run.process_group import refuse_duplicate_training
from launch.track.messages import announcement, final_figures, last_words
from launch.track.meter import LogSchedule, Meter
from launch.track.tracker import open_tracker
from model.device import autocast, choose_device, choose_precision, profiled, set_up_process
from model.sharding import full_norm
from optim import build_optimizer, build_rule


@harmless_output()
def main(settings: Config) -> int:
    """Trains one run, and returns the exit code of the process."""
    plan = make_plan(settings)
    if settings.plan_only:
        check_data(settings.data, settings.tokenizer, settings.batch.length)
        name = identity.run_name(settings)
        print(describe(settings, plan, name), describe_memory(settings, plan), sep="\n\n")
        return 0
    refuse_duplicate_training(settings.parallel)
    refuse_too_large_for_machine(settings, plan)
    with open_run_folder(settings) as opened:
        if opened.finished:
            confirm_finished(opened, settings)
            return 0
        # Until `claim` nothing is written, and signals are not caught yet: a mistake that is found
        # while the run is built leaves no trace.
        run = Run(settings, plan, opened)
        with closing(run.checkpoints):
            run.checkpoints.refuse_disagreement(run.progress)
            opened.claim(settings)
            with Preemption(settings.minutes) as run.preemption:
                return run.train()


class Run:
    """A run under way."""

    preemption: Preemption

    def __init__(self, settings: Config, plan: Plan, opened: OpenRun) -> None:
        self.settings, self.plan, self.opened, self.layout = settings, plan, opened, opened.layout
        self.device = choose_device(settings.device)
        self.dtype = choose_precision(settings.precision, self.device)
        set_up_process(settings.seed, self.layout.rank, settings.deterministic, self.device)

        # What a run is made of, in the order in which one needs the other.
        self.data = open_data(settings, opened.liveness)
        opened.liveness.report_phase("building the model", timeout_factor=FIRST_STEP_FACTOR)
        self.model = build_model(settings, plan, self.layout, self.device, self.dtype)
        self.optimizer = build_optimizer(self.model, settings.optim)
        self.rule = build_rule(self.model, self.optimizer, settings.optim, plan.schedule)

        corpus = self.data.corpus
        trained = Trained(self.model, self.optimizer, self.rule, corpus, self.layout)
        self.start = resume_or_start(opened.folder, settings, trained, plan.schedule)
        self.progress = self.start.progress
        self.first_step = self.progress.step
        self.checkpoints = Checkpoints(opened, settings, plan, trained, self.start)
        self.meter = Meter(plan, self.device, self.layout.world, settings.activation_checkpointing)
        every, diagnostics = plan.tracking_every, settings.optim.diagnostics_every
        self.log_schedule = LogSchedule(plan.schedule, every, diagnostics)

    def train(self) -> int:
        """Trains until the horizon, or until somebody asks to stop; returns the exit code."""
        self.tracker = open_tracker(self.opened, self.settings, self.plan, self.start)
        self.rule.say = say = self.tracker.message
        device_and_precision = f"{self.device.type} in {str(self.dtype).removeprefix('torch.')}"
        start_note = self.start.note
        for line in announcement(
            self.settings, self.plan, self.opened, self.optimizer, device_and_precision, start_note
        ):
            say(line)
        self.model.train()
        pinned = self.device.type == "cuda"
        self.prefetcher = Prefetcher(self.data.loader, self.progress.step, pin=pinned)
        self.meter.begin(self.progress, self.prefetcher.seconds_waiting)
        traces = self.settings.profile and self.layout.main
        with profiled(self.opened.folder / "trace.json" if traces else None) as after_step:
            code = self.loop(after_step)
        self.prefetcher.close()
        self.checkpoints.end_save(say)
        if code == 0:
            self.finish()
        self.tracker.close(code)
        return code

    def loop(self, after_step: Callable[[], None]) -> int:
        """Steps, evaluates, logs and saves; returns the exit code."""
        progress, steps, say = self.progress, self.plan.schedule.steps, self.tracker.message
        while True:
            self.evaluate_if_due()
            # An evaluation that a stop cut short stays due, and its row waits for it.
            stopping = None
            if progress.step < steps or self.evaluation_due():
                stopping = self.layout.any_rank(self.preemption.requested)
            if progress.row and not self.evaluation_due():
                self.log()
            self.checkpoints.end_save_if_done(say)
            if self.checkpoints.due(progress.step, bool(stopping)):
                self.save(must_succeed=bool(stopping) or progress.step == steps)
            if stopping:
                say(f"{stopping}: saved step {progress.step}; the same command goes on from there")
                return EXIT_PREEMPTED
            if progress.step == steps:
                return 0
            self.step()
            if progress.skipped_in_a_row >= self.settings.max_skipped:
                say(
                    f"error: {progress.skipped_in_a_row} steps in a row were not finite"
                    f" (max_skipped), up to batch {progress.step - 1}; the last checkpoint is"
                    " intact; lower optim.lr or look at the data"
                )
                return EXIT_DIVERGED
            after_step()

    def step(self) -> None:
        """Takes one optimiser step. A loss or gradient that is not finite leaves weights and
        optimiser as they are."""
        # Data, rate and radius are functions of the step's number: a resumed run has the same.
        progress, schedule, began = self.progress, self.plan.schedule, time.perf_counter()
        batch = self.prefetcher.next()
        batches = part_of(batch, self.plan.micro, self.plan.num_groups, self.layout, self.device)
        self.report_phase("training")
        lr = schedule.lr(progress.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.rule.rho = schedule.radius(progress.step)
        row_step = self.log_schedule.row(progress.step)
        measured = self.log_schedule.is_measured(progress.step)
        diagnosed = self.log_schedule.is_diagnosed(progress.step)

        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            result = self.rule.gradient(batches, measured, diagnosed)
        norm = math.nan
        if result.finite:
            clip = self.settings.optim.clip or math.inf
            norm = full_norm(clip_grad_norm_(self.model.parameters(), clip))
        # A rule of one pass knows the loss at the moved weights only.
        found = result.perturbed_loss if result.loss is None else result.loss
        loss = math.nan if found is None else found.item()
        if math.isfinite(loss) and math.isfinite(norm):
            self.optimizer.step()
            progress.count_loss(result, loss)
        else:
            self.tracker.message(
                f"skipped batch {progress.step}: loss {loss}, gradient norm {norm}"
            )
            progress.count_skipped()

        progress.count_step(result, self.plan)
        progress.seconds += time.perf_counter() - began
        if measured:
            progress.measured = {name: float(value) for name, value in result.metrics.items()}
        if progress.step == row_step:
            progress.row = self.meter.row(progress, self.prefetcher.seconds_waiting, lr, norm)

    def evaluation_due(self) -> bool:
        """Returns whether an evaluation is due: at the first step, at every interval and at the
        end, once. A row that is logged already cannot take one."""
        step, done = self.progress.step, self.progress.evaluated
        at_interval = step % self.plan.evaluation_every == 0 or step == self.plan.schedule.steps
        return done < 0 or (at_interval and step not in (done, self.progress.logged))

    def evaluate_if_due(self) -> None:
        """Evaluates; asked to stop meanwhile, it leaves that to the next start."""
        if not self.evaluation_due():
            return
        self.report_phase("evaluating")
        sets, micro, layout = self.data.sets, self.plan.micro, self.layout
        with self.meter.pause():
            found = evaluate(self.model, sets, micro, self.autocast, self.is_asked_to_stop, layout)
        if found is not None:
            self.progress.evaluated, self.progress.validation = self.progress.step, found
            self.progress.row |= found

    def log(self) -> None:
        """Logs the row of this step with how far the run has come."""
        self.tracker.log(self.progress.counts() | self.progress.row)
        self.progress.row, self.progress.logged = {}, self.progress.step

    def save(self, must_succeed: bool) -> None:
        """Saves, while the clock of the rows stands still."""
        with self.meter.pause():
            self.checkpoints.save(self.progress, self.tracker, must_succeed)

    def finish(self) -> None:
        """Writes the summary, and says what the run came to."""
        progress, settings, opened = self.progress, self.settings, self.opened
        opened.liveness.report_phase("finishing", progress.step, math.inf)
        self.layout.on_main(opened.lock.refuse_moved_folder)
        if not self.layout.main:
            return
        figures = final_figures(opened, settings, self.plan, progress, self.data)
        # Before anything is shown: from here on the run is done.
        self.tracker.summary(figures)
        for text in last_words(opened.folder, settings, figures, self.data, self.device):
            self.tracker.message(text)

    def report_phase(self, phase: str) -> None:
        """Tells the watchdog what is done at this step. The first one compiles."""
        factor = FIRST_STEP_FACTOR if self.progress.step == self.first_step else 1.0
        self.opened.liveness.report_phase(phase, self.progress.step, factor)

    def is_asked_to_stop(self) -> bool:
        """Returns whether a signal or the time limit asks for an end."""
        return bool(self.preemption.requested)

    def autocast(self) -> AbstractContextManager:
        """Returns the context in which the model computes in the run's precision."""
        return autocast(self.device, self.dtype)


if __name__ == "__main__":
    config.main(main)
