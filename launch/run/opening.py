"""Opens a run folder: the processes meet, and the main one holds the folder until all is done."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from conf.ranks import rank_and_world
from conf.schema import Config
from data.files import remove_temporary
from launch.run import identity
from launch.run.folder import FILES, read_summary, remove_partial_checkpoints
from launch.run.liveness import Liveness
from launch.run.lock import RunLock
from launch.run.process_group import processes
from launch.run.snapshot import snapshot_code
from launch.run.watchdog import Watchdog
from model.device import choose_device
from model.processes import Layout


@dataclass
class OpenRun:
    """A run folder that is held, and the processes that hold it.

    name        the run's, from its configuration
    folder      where it writes
    layout      the processes, which have met
    liveness    by which each shows that it gets on
    lock        keeps other runs out of the folder
    finished    whether the folder says that the run is done
    """

    name: str
    folder: Path
    layout: Layout
    liveness: Liveness
    lock: RunLock
    finished: bool = False

    def claim(self, settings: Config) -> None:
        """Makes the folder this run's: it gets the configuration and the code."""
        self.layout.on_main(
            lambda: identity.claim(self.folder, settings), lambda: snapshot_code(self.folder)
        )


@contextmanager
def open_run_folder(settings: Config) -> Iterator[OpenRun]:
    """Has the processes of a run meet, and holds its folder.

    Raises ValueError where another run holds it, or where what lies in it is another's."""
    name = identity.run_name(settings)
    folder = Path(settings.dir or f"runs/{name}")
    lock, layout = RunLock(folder), Layout(*rank_and_world())
    with ExitStack() as stack:
        # The watchdog comes first and goes last: processes may die before they have met.
        watchdog = stack.enter_context(Watchdog(folder, layout, settings.parallel.timeout))
        device = choose_device(settings.device)
        stack.enter_context(processes(settings.parallel, device, layout, watchdog.liveness))
        # One process holds the folder for all. Until here nothing in it is touched.
        layout.on_main(
            lambda: stack.enter_context(lock),
            lambda: identity.refuse_another(folder, settings),
            lambda: read_summary(folder),
        )
        # A finished run is not watched and not changed; it only says that it is done.
        finished = layout.any_rank((folder / "summary.json").exists())
        if not finished:
            stack.enter_context(watchdog.heartbeats())
            layout.on_main(lambda: clear(folder))
        yield OpenRun(name, folder, layout, watchdog.liveness, lock, finished)


def clear(folder: Path) -> None:
    """Removes what killed starts left half written in a run folder that is held."""
    remove_partial_checkpoints(folder)
    remove_temporary(folder, FILES)
    remove_temporary(folder / "code")
