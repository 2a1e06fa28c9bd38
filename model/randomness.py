"""Random numbers that depend on a seed and a name, and on nothing else."""

import hashlib

import torch


def named_generator(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """Returns a generator whose stream depends on the seed and the name only, on a kind of device:
    not on the order in which generators are made, nor on the process."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little", signed=True))
