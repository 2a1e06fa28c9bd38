"""How the global batch is parted into groups and micro-batches."""

from conf.keys import is_read
from conf.ranks import num_processes
from conf.schema import Config


def num_groups(config: Config) -> int:
    """Groups of the batch that are perturbed apart."""
    return config.optim.num_groups if is_read(config, "optim.num_groups") else 1


def micro_sequences(config: Config) -> int:
    """Sequences per forward on each process: batch.micro, else all of a group."""
    return config.batch.micro or config.batch.sequences // (
        num_groups(config) * num_processes(config.parallel)
    )
