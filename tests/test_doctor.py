"""What launch.doctor says of a machine; what is not here has a stand-in."""

import errno
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launch.doctor import hardware, places, self_check, several, software
from launch.doctor.finding import VERDICTS, Finding, is_bad, show
from model import device as model_device
from model.device import ieee_products

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
GIB = 2**30


def doctor(folder, *arguments, **environment):
    """Starts launch.doctor in a folder, with the home folder there."""
    return subprocess.Popen(
        [sys.executable, "-m", "launch.doctor", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(folder), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines_of(process):
    """Returns what a process has printed, line by line."""
    out, err = process.communicate(timeout=300)
    assert not err, err
    return out.splitlines()


# The command


def test_a_machine_that_works(tmp_path):
    process = doctor(tmp_path, CUDA_VISIBLE_DEVICES="")
    *lines, last = lines_of(process)
    assert process.returncode == 0
    assert all(line.split()[0] in VERDICTS for line in lines)
    assert any(line.startswith("ok       cpu fp32") for line in lines)
    counted = {verdict: sum(line.startswith(verdict) for line in lines) for verdict in VERDICTS}
    assert last == ", ".join(f"{count} {verdict}" for verdict, count in counted.items())
    assert counted["failed"] == 0
    # W&B keeps folders of its own in the home folder as soon as it is asked.
    assert {path.name for path in tmp_path.iterdir()} <= {".config", ".cache", ".local"}


def test_a_failure_is_one_line_and_the_exit_code(tmp_path):
    (tmp_path / "file").write_text("in the way")
    process = doctor(tmp_path, f"data.cache={tmp_path}/file/cache", CUDA_VISIBLE_DEVICES="")
    failed = [line for line in lines_of(process) if line.startswith("failed")]
    assert process.returncode == 1
    assert len(failed) == 1
    assert "data.cache" in failed[0] and "Not a directory" in failed[0]
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_mistake_in_the_command(tmp_path):
    process = doctor(tmp_path, "data.cach=x")
    assert "data.cach" in process.communicate()[1]
    assert process.returncode == 2


def test_help_says_how_to_start_several(tmp_path):
    process = doctor(tmp_path, "-h")
    assert "torchrun" in "\n".join(lines_of(process))
    assert process.returncode == 0


def test_two_processes_exchange_and_a_failure_of_one_is_told(tmp_path):
    """The second one has its cache where no folder can be."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "file").write_text("")
    caches = (tmp_path / "cache", tmp_path / "file" / "cache")
    processes = [
        doctor(
            tmp_path,
            f"data.cache={cache}",
            RANK=str(rank),
            WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            CUDA_VISIBLE_DEVICES="",
        )
        for rank, cache in enumerate(caches)
    ]
    main, other = (lines_of(process) for process in processes)
    assert not other
    assert [process.returncode for process in processes] == [1, 1]
    reduced = next(line for line in main if line.startswith("ok       all-reduce"))
    assert re.search(r"2 processes, gloo, 16 MiB in .* ms, bus .* GB/s", reduced)
    failed = [line for line in main if line.startswith("failed")]
    assert len(failed) == 1 and f"rank 1 on {socket.gethostname()}" in failed[0]


# Gradients


def test_gradients_in_bf16_are_held_against_those_of_the_cpu(monkeypatch):
    """On a CPU they are the same; a rule that is a hundredth off is found in fp32."""
    monkeypatch.setattr(self_check, "choose_precision", lambda *_: torch.bfloat16)
    fp32, bf16 = self_check.check_gradients(CPU)
    assert (fp32.verdict, bf16.verdict) == ("ok", "ok")

    exact = self_check.gradient

    def wrong(axes, model, optimizer, batches):
        found = exact(axes, model, optimizer, batches)
        is_exact = next(model.parameters()).dtype == torch.float64
        if axes.get("path") == "functional" and not is_exact:
            found = {key: 1.01 * gradient for key, gradient in found.items()}
        return found

    monkeypatch.setattr(self_check, "gradient", wrong)
    fp32, bf16 = self_check.check_gradients(CPU)
    assert (fp32.verdict, bf16.verdict) == ("failed", "ok")
    assert "functional_sam" in fp32.found and "cannot be trusted" in fp32.remedy


@pytest.mark.parametrize("error", [1.1e-5, float("inf"), float("nan")])
def test_an_error_beyond_the_bound_or_no_number_fails(error):
    assert self_check.judged("cuda:0 fp32", error, 1e-5, "").verdict == "failed"
    assert self_check.judged("cuda:0 fp32", 1e-5, 1e-5, "").verdict == "ok"


def test_matrix_products_are_in_fp32_while_gradients_are_compared():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with ieee_products():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_an_error_of_the_device_is_a_finding():
    from launch.doctor.examine import guarded

    def check():
        yield Finding("ok", "cuda:0 fp32", "fine")
        raise RuntimeError("CUDA error: an illegal memory access\nmore lines")

    first, second = guarded("cuda:0", check)
    assert first.verdict == "ok"
    assert str(second).startswith("failed   cuda:0       CUDA error: an illegal memory access; ")


# Devices


class Cuda:
    """Stands in for torch.cuda on a machine with two devices."""

    def __init__(self, free=0.97, name="NVIDIA H100 80GB HBM3", capability=(9, 0), reach=True):
        self.free = free
        self.name = name
        self.capability = capability
        self.reach = reach

    def use(self, monkeypatch):
        stand_in = {
            "mem_get_info": lambda index: (int(self.free * 80 * GIB), 80 * GIB),
            "get_device_capability": lambda index: self.capability,
            "is_bf16_supported": lambda including_emulation: self.capability >= (8, 0),
            "get_device_name": lambda index: self.name,
            "can_device_access_peer": lambda i, j: self.reach,
        }
        for name, function in stand_in.items():
            monkeypatch.setattr(torch.cuda, name, function)


@pytest.mark.parametrize(
    "cuda, verdict, part",
    [
        (Cuda(), "ok", "H100 80GB HBM3, sm_90, 77.6 of 80.0 GiB free, bf16"),
        (Cuda(free=0.5), "warning", "40.0 of 80.0 GiB free, bf16; nvidia-smi shows"),
        (Cuda(name="Tesla T4", capability=(7, 5)), "note", "no bf16; its peak is unknown"),
    ],
)
def test_devices(monkeypatch, cuda, verdict, part):
    cuda.use(monkeypatch)
    found = hardware.device(1)
    assert (found.verdict, found.subject) == (verdict, "cuda:1")
    assert part in str(found)


@pytest.mark.parametrize(
    "driver, hidden, built, verdict, part",
    [
        (False, None, None, "note", "no CUDA device"),
        (True, "", "13.0", "warning", "CUDA_VISIBLE_DEVICES='' hides all devices; unset it"),
        (True, None, None, "failed", "is built for CPUs"),
        (True, None, "13.0", "failed", "sees no device of the driver"),
    ],
)
def test_why_there_is_no_device(monkeypatch, driver, hidden, built, verdict, part):
    monkeypatch.setattr(hardware.shutil, "which", lambda name: "/bin/true" if driver else None)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    found = hardware.without_cuda()
    assert found.verdict == verdict
    assert part in str(found)


def test_the_toolchain_names_what_is_missing(monkeypatch):
    monkeypatch.setattr(model_device, "find_spec", lambda name: None)
    monkeypatch.setattr(model_device.shutil, "which", lambda name: None)
    found = hardware.toolchain()
    assert found.verdict == "warning"
    assert "triton, C compiler" in found.found


def test_what_connects_devices(monkeypatch, tmp_path):
    shown = "\tGPU0\tGPU1\tCPU Affinity\nGPU0\t X \tNV18\t0-47\nGPU1\tNV18\t X \t0-47\n"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{shown}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    Cuda().use(monkeypatch)
    found = hardware.peers(2)
    assert found.verdict == "ok"
    assert found.found == "2 of 2 pairs of devices reach each other's memory, NVLink (NV18)"
    Cuda(reach=False).use(monkeypatch)
    assert hardware.peers(2).verdict == "note"
    (tmp_path / "nvidia-smi").unlink()
    assert "links unknown" in hardware.peers(2).found


def test_little_shared_memory_is_a_warning(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "LEAST_SHARED_MEMORY", 2**60)
    assert "--shm-size" in str(hardware.shared_memory(tmp_path))
    assert hardware.shared_memory(tmp_path / "none").verdict == "warning"


# Places and accounts


def test_folders(monkeypatch, tmp_path):
    found = places.folder("data.cache", tmp_path / "one" / "two")
    assert found.verdict == "ok" and f"to be made in {tmp_path}" in found.found
    monkeypatch.setattr(places, "LEAST_FREE", 2**70)
    assert places.folder("dir", tmp_path).verdict == "warning"
    assert not list(tmp_path.iterdir())


def test_a_disk_without_locks_is_told(monkeypatch, tmp_path):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(places.fcntl, "lockf", refuse)
    found = places.folder("dir", tmp_path)
    assert found.verdict == "note" and "no locks" in found.found


def test_gpt2_ranks(monkeypatch, tmp_path):
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    assert places.tokenizer(tmp_path).verdict == "note"
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "vocab.bpe").write_text("")
    assert str(tmp_path / "gpt2" / "vocab.bpe") in places.tokenizer(tmp_path).found


def test_slurm(monkeypatch, tmp_path):
    """There is none, it answers, it does not answer, and submitit is missing."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert places.slurm().verdict == "note"
    for name in ("sbatch", "sinfo"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'gpu* up 1-00:00:00 4 nodes gpu:8'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(places, "find_spec", lambda name: True)
    assert places.slurm() == Finding("ok", "slurm", "gpu* up 1-00:00:00 4 nodes gpu:8")
    monkeypatch.setattr(places, "find_spec", lambda name: None)
    assert "[slurm]" in places.slurm().remedy
    (tmp_path / "sinfo").write_text("#!/bin/sh\nexit 1\n")
    assert places.slurm().verdict == "warning"


# Software and the table


def test_versions(monkeypatch):
    assert software.python((3, 10, 4)).verdict == "failed"
    assert software.python((3, 11, 0)).verdict == "ok"
    assert software.python((3, 14, 0)).verdict == "note"
    assert not is_bad(software.software())
    missing = software.packages(["torch>=2.11,<2.14", "no-such-package>=1"])
    assert missing.verdict == "failed" and "no-such-package is missing" in missing.found
    assert "torch" in software.packages(["torch>=99"]).found


def test_the_table_counts_its_verdicts(capsys):
    found = show([Finding("ok", "a", "b")], [Finding("failed", "c", "d", "do e")])
    assert is_bad(found)
    assert capsys.readouterr().out.splitlines() == [
        "ok       a            b",
        "failed   c            d; do e",
        "1 ok, 0 note, 0 warning, 1 failed",
    ]


def test_what_other_processes_add_to_the_table(monkeypatch):
    """Subjects of their own, and each warning and failure once a host."""

    def finding(verdict, subject):
        return Finding(verdict, subject, "found")

    own = [finding("ok", "disk"), finding("failed", "nccl"), finding("ok", "cuda:0")]
    others = [
        ("a", [finding("ok", "disk"), finding("failed", "nccl"), finding("ok", "cuda:1")]),
        ("b", [finding("failed", "disk"), finding("failed", "nccl"), finding("note", "disk")]),
        ("b", [finding("failed", "disk"), finding("failed", "nccl"), finding("ok", "cuda:1")]),
    ]

    def all_gather_object(gathered, mine):
        gathered[:] = [mine, *others]

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    added = several.gather(list(own), 4, "a")[len(own) :]
    assert [(f.verdict, f.subject, f.found.removesuffix(": found")) for f in added] == [
        ("ok", "cuda:1", "rank 1 on a"),
        ("failed", "disk", "rank 2 on b"),
        ("failed", "nccl", "rank 2 on b"),
        ("ok", "cuda:1", "rank 3 on b"),
    ]


def test_processes_that_do_not_meet_end_in_a_line(monkeypatch):
    def refuse(*_):
        raise torch.distributed.DistNetworkError("The client socket has timed out\nmore")

    monkeypatch.setattr(several, "met", refuse)
    with (
        pytest.raises(ValueError, match="2 processes do not meet: The client socket has timed out"),
        several.process_group(1, 2, CPU),
    ):
        pass
