"""The checkpoints of a run under way: when one is due, what goes into it, and what is said where
the disk refuses it."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from conf.schema import Config
from launch.checkpoint.replicated import refuse_divergence, replicated
from launch.checkpoint.resume import Trained, tensors_of
from launch.checkpoint.saver import Saver
from launch.plan.plan import Plan
from launch.run import identity
from launch.run.opening import OpenRun
from launch.track.progress import Progress, Start, State
from launch.track.tracker import Silent, Tracker
from model.checkpoint import checkpoints


class Checkpoints:
    """Saves a run. A thread writes while the run goes on; at most one save is under way.

    opened     the run folder
    settings   the run
    plan       its horizon, and the steps between checkpoints
    trained    what is saved
    start      where this start of the run began
    """

    def __init__(
        self, opened: OpenRun, settings: Config, plan: Plan, trained: Trained, start: Start
    ) -> None:
        self.opened, self.settings, self.plan = opened, settings, plan
        self.trained, self.start = trained, start
        self.first_step = start.progress.step
        self.saver = Saver(opened.folder, opened.layout)

    def due(self, step: int, stopping: bool) -> bool:
        """Returns whether a checkpoint is due: at every interval, at milestones, at a stop and at
        the end. What this start was restored from is never written again: a kill meanwhile would
        lose it."""
        # Where a run begins, from scratch or from another run, it saves a milestone only.
        begins = step == self.first_step
        if begins and self.start.resumed:
            return False
        at_interval = step % self.plan.checkpoint_every == 0 and not begins
        marked = (self.plan.schedule.steps, *self.settings.checkpoint.milestones)
        return stopping or at_interval or step in marked

    def save(self, progress: Progress, tracker: Tracker | Silent, must_succeed: bool) -> None:
        """Begins to save a checkpoint once the one before is on disk; one that must succeed is
        waited for."""
        opened, trained, keep = self.opened, self.trained, self.settings.checkpoint
        state = State(
            step=progress.step,
            progress=progress,
            model=asdict(trained.model.config),
            tokenizer=trained.corpus.tokenizer.hash,
            data=trained.corpus.fingerprint,
            identity=identity.canonical(self.settings),
            wandb_id=tracker.wandb_id,
            rows=tracker.counted,
            origin=self.start.origin,
        )
        # The save before comes to its end first: there is one copy of the state, and one thread.
        opened.liveness.report_phase("saving", progress.step)
        self.end_save(tracker.message)
        # Nothing is saved that could not be gone on from: in a folder that is not there any more,
        # or of processes that hold different weights.
        opened.layout.on_main(opened.lock.refuse_moved_folder)
        self.refuse_disagreement(progress)
        # The checkpoint counts the rows so far, so they go to disk before it does.
        tracker.sync()
        tensors = tensors_of(trained.model, trained.optimizer, trained.rule, trained.layout)
        self.saver.begin(
            tensors, asdict(state), trained.corpus.tokenizer, keep.keep, keep.milestones
        )
        if must_succeed:
            self.end_save(tracker.message, must_succeed)

    def end_save(self, say: Callable[[str], Any], must_succeed: bool = False) -> None:
        """Waits for the save under way. Where the disk refused it, the run goes on with a warning.

        Raises ValueError instead where the save must succeed: nothing would save the run later."""
        step, error = self.saver.step, self.saver.wait()
        if error and must_succeed:
            folder = self.opened.folder
            goes_on = "begins anew"
            if checkpoints(folder):
                goes_on = "goes on from the checkpoint before"
            raise ValueError(
                f"step {step} could not be saved ({error}); make room on the disk of {folder} and"
                f" start the same command again: it {goes_on}"
            )
        if error:
            say(
                f"warning: step {step} could not be saved ({error}); the checkpoints before it are"
                " intact"
            )

    def end_save_if_done(self, say: Callable[[str], Any]) -> None:
        """Ends the save under way where it has come to its end."""
        if self.saver.done:
            self.end_save(say)

    def refuse_disagreement(self, progress: Progress) -> None:
        """Raises ValueError where the processes do not hold the same."""
        trained = self.trained
        settings = identity.canonical(self.settings) | asdict(self.settings.parallel)
        for name in ("evaluation_every", "checkpoint_every", "tracking_every", "micro"):
            settings[name] = getattr(self.plan, name)
        values = replicated(settings, trained.corpus, progress, trained.optimizer, trained.rule)
        refuse_divergence(trained.layout, values, trained.model, trained.optimizer, trained.rule)

    def close(self) -> None:
        """Lets the save under way come to its end."""
        self.saver.close()
