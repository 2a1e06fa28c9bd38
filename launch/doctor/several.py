"""What several processes find together: that they meet, agree, and how fast they exchange."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

from launch.doctor.finding import Finding
from launch.run.process_group import BACKENDS, local_index, met

# Processes that have not met or answered by then are taken for lost.
PATIENCE = timedelta(seconds=120)
# Bytes that are summed: the gradients of a block of a billion parameters on devices, less on CPUs.
NUM_BYTES = {"cuda": 256 * 2**20, "cpu": 16 * 2**20}
ROUNDS = 5


def local_device() -> torch.device:
    """Returns the device of this process, as a run would choose it, and makes it the current
    one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_index())
    torch.cuda.set_device(device)
    return device


@contextmanager
def process_group(rank: int, world: int, device: torch.device) -> Iterator[None]:
    """Forms a group of all processes, as a run does. Raises ValueError where they do not meet."""
    try:
        torch.distributed.init_process_group(
            BACKENDS[device.type],
            store=met(rank, world),
            rank=rank,
            world_size=world,
            timeout=PATIENCE,
        )
    except (RuntimeError, torch.distributed.DistError) as error:
        raise ValueError(
            f"{world} processes do not meet: {str(error).splitlines()[0]}; check MASTER_ADDR,"
            " the firewall between the nodes, and GLOO_SOCKET_IFNAME"
        ) from None
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def check_all_reduce(rank: int, world: int, device: torch.device) -> Finding:
    """Returns whether a sum over all processes is right, and at which bandwidth it is taken.

    Bandwidth is that of the bus as NCCL's tests count it: 2 (n - 1) / n bytes pass each process
    for a byte that n processes sum."""
    num_bytes = NUM_BYTES[device.type]
    seconds = []
    for _ in range(1 + ROUNDS):
        x = torch.full((num_bytes // 4,), float(rank + 1), device=device)
        synchronize(device)
        began = time.perf_counter()
        torch.distributed.all_reduce(x)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    is_right = bool((x == world * (world + 1) / 2).all())
    if not is_right:
        return Finding(
            "failed",
            "all-reduce",
            f"a sum over {world} processes is wrong",
            "try NCCL_P2P_DISABLE=1 to find the link; report this line",
        )
    # The first one sets up connections.
    median = sorted(seconds[1:])[ROUNDS // 2]
    bandwidth = 2 * (world - 1) / world * num_bytes / median / 1e9
    backend = "nccl" if device.type == "cuda" else "gloo"
    return Finding(
        "ok",
        "all-reduce",
        f"{world} processes, {backend}, {num_bytes // 2**20} MiB in {1e3 * median:.1f} ms, bus"
        f" {bandwidth:.1f} GB/s",
    )


def synchronize(device: torch.device) -> None:
    """Waits for a CUDA device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gather(findings: list[Finding], world: int, host: str) -> list[Finding]:
    """Returns the findings of the main process, and of the others those on subjects that it does
    not have, as their devices, and each warning and failure, once a host."""
    gathered: list[tuple[str, list[Finding]]] = [(host, findings)] * world
    torch.distributed.all_gather_object(gathered, (host, findings))
    main_host, shown = gathered[0]
    subjects = {finding.subject for finding in shown}
    known = {(main_host, finding.subject, finding.verdict) for finding in shown}
    for rank, (its_host, theirs) in enumerate(gathered[1:], 1):
        for finding in theirs:
            is_alike = finding.subject in subjects and finding.verdict in ("ok", "note")
            entry = (its_host, finding.subject, finding.verdict)
            if is_alike or entry in known:
                continue
            known.add(entry)
            found = f"rank {rank} on {its_host}: {finding.found}"
            shown.append(Finding(finding.verdict, finding.subject, found, finding.remedy))
    return shown
