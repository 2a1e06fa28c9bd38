"""Where the processes of a run meet, and what random numbers they draw."""

import pytest
import torch

from launch.process import first_host, meeting_point, peak_flops, seed_everything


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L4", 121e12),
     ("NVIDIA L40S", 362e12), ("NVIDIA L40", None), ("NVIDIA GH200 480GB", 989e12), ("NVIDIA GB200", None)],
)  # fmt: skip
def test_the_peak_of_a_device_is_its_own_or_none(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu7", "gpu7"), ("gpu7,login1", "gpu7"), ("gpu[003-005,7],login1", "gpu003"), ("gpu[12,14-15]", "gpu12"), ("a1,gpu[3-4]", "a1")],
)
def test_first_host(nodes, first):
    assert first_host(nodes) == first


def test_steps_and_jobs_on_a_node_meet_apart():
    """On the first node of the step, which need not be that of the job."""
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "gpu[1-4]", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[3-4]"}
    assert meeting_point(job)["MASTER_ADDR"] == "gpu3" and meeting_point(job) == meeting_point(dict(job))
    ports = {int(meeting_point(job | {"SLURM_JOB_ID": str(j), "SLURM_STEP_ID": str(s)})["MASTER_PORT"]) for j in range(4711, 5211) for s in range(16)}
    assert len(ports) == 500 * 16 and min(ports) >= 1024 and max(ports) < 32768  # where Linux begins to give ports to whoever asks


def test_every_process_draws_numbers_of_its_own():
    """Those of the main process are of the seed itself. Two seeds that share their lower 32 bits would draw the same on a CPU."""
    drawn = {}
    with torch.random.fork_rng():
        for seed in (0, 7):
            for rank in range(64):
                seed_everything(seed, rank, deterministic=False)
                drawn[seed, rank] = torch.rand(4), torch.initial_seed()
            assert torch.equal(drawn[seed, 0][0], torch.rand(4, generator=torch.Generator().manual_seed(seed)))
    assert len({tuple(numbers.tolist()) for numbers, _ in drawn.values()}) == len({seed for _, seed in drawn.values()}) == 128
