"""What runs on CUDA only, by stand-ins that note what is asked of a device and in which order. They
show shape and order, no numbers and no time: those are for tests/gpu, where a device is."""

import os
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model.device
from data.loader import Prefetcher
from launch.checkpoint import saver
from launch.doctor import several
from launch.plan.batch import part_of
from launch.run import process_group
from model import GPT, GPTConfig, chunked_head, gpt, parallelize
from model.device import float32_switches, has_fast_products, ieee_products
from model.processes import Layout
from model.sharding import reshard
from optim import SharpnessAware
from optim.adamw import load_state_tensors
from optim.rule import sharpness
from optim.rule.conditions import random_state, rounds, same_masks, set_random_state
from optim.rule.cotangents import free_memory

CUDA = torch.device("cuda")
SECOND = torch.device("cuda", 1)


@pytest.fixture
def events():
    """What was asked for, in order."""
    return []


class OnCuda(torch.Tensor):
    """A tensor that passes for one of cuda:1."""

    is_cuda = True
    log: list | None = None

    def get_device(self):
        return 1

    def record_stream(self, stream):
        self.log.append(("record_stream", stream))


def on_cuda(tensor, log=None):
    """Returns a tensor as one of cuda:1, which logs the streams that are recorded."""
    found = tensor.as_subclass(OnCuda)
    found.log = log
    return found


# Streams and pinned memory


def test_a_sum_over_replicas_holds_the_gradient_on_the_stream_that_sums(events, monkeypatch):
    """FSDP2 calls the hook on its all-reduce stream; the gradient is of another stream, and freed
    there it could be given away while it is summed."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "all-reduce")
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda tensor, group: events.append(("sum", group))
    )
    layout = Layout(replicas="replicas")
    layout.sum_over_replicas(on_cuda(torch.ones(3), events))
    assert events == [("record_stream", "all-reduce"), ("sum", "replicas")]


class Pinned(torch.Tensor):
    """Memory of the host that notes how it is written."""

    log: list | None = None

    def copy_(self, source, non_blocking=False):
        self.log.append(("copy", non_blocking))
        return super().copy_(source.as_subclass(Pinned))


def test_a_save_waits_for_its_copies_before_a_thread_reads_them(events, monkeypatch, tmp_path):
    empty = torch.empty

    def pinned(*size, pin_memory=False, **others):
        events.append(("pinned", pin_memory))
        found = empty(*size, **others).as_subclass(Pinned)
        found.log = events
        return found

    stream = SimpleNamespace(synchronize=lambda: events.append("synchronize"))
    monkeypatch.setattr(torch, "empty", pinned)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    saving = saver.Saver(tmp_path, Layout())
    monkeypatch.setattr(
        saving, "thread", SimpleNamespace(submit=lambda *_: events.append("thread"))
    )
    tensors = {"model": {"w": on_cuda(torch.ones(2)), "b": on_cuda(torch.ones(3))}}
    saving.begin(tensors, {"step": 1}, None, 1, [])
    one = [("pinned", True), ("copy", True)]
    assert events == [*one, *one, "synchronize", "thread"]

    # The next save writes to the same places.
    events.clear()
    saving.begin(tensors, {"step": 2}, None, 1, [])
    assert events == [("copy", True), ("copy", True), "synchronize", "thread"]


def test_a_save_of_state_on_the_host_waits_for_no_device(events, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: pytest.fail("there is no device"))
    saving = saver.Saver(tmp_path, Layout())
    monkeypatch.setattr(
        saving, "thread", SimpleNamespace(submit=lambda *_: events.append("thread"))
    )
    saving.begin({"model": {"w": torch.ones(2)}}, {"step": 1}, None, 1, [])
    assert events == ["thread"] and not saving.copies["model"]["w"].values.is_pinned()


def test_batches_are_pinned_by_a_thread_on_the_device_of_the_process(events, monkeypatch):
    """A new thread is on cuda:0, and pinning there would make a context of every process."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: events.append(device))

    def pin_memory(tensor):
        events.append("pin")
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    batch = (torch.ones(2, 4), torch.zeros(2, 4))
    loader = SimpleNamespace(batch=lambda step, rows: batch)
    prefetcher = Prefetcher(loader, pin=True)
    prefetcher.next()
    prefetcher.close()
    assert events[:3] == [3, "pin", "pin"] and events.count(3) == 1

    events.clear()
    prefetcher = Prefetcher(loader)
    prefetcher.next()
    prefetcher.close()
    assert events == []


def test_batches_go_to_the_device_without_waiting(events):
    class Batch(torch.Tensor):
        def to(self, device, non_blocking=False):
            # Rows that lie apart would be gathered on the host first, which waits.
            events.append((device, non_blocking, self.is_contiguous()))
            return self

    batch = tuple(torch.zeros(8, 4, dtype=torch.int64).as_subclass(Batch) for _ in range(2))
    part_of(batch, 2, 1, Layout(rank=1, world=2), CUDA)
    assert events == [(CUDA, True, True)] * 4


def test_shards_on_the_host_move_once_the_device_has_read_them(events, monkeypatch):
    """A gather of offloaded shards copies from pinned memory, which `moved` is about to change."""

    class Sharded(nn.Linear):
        def reshard(self):
            events.append("reshard")

    def owner(kind):
        module = Sharded(2, 2, bias=False)
        module.weight.device_mesh = SimpleNamespace(device_type=kind)
        return module

    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: events.append("synchronize"))
    reshard(owner("cuda"))
    assert events == ["reshard", "synchronize"]
    events.clear()
    reshard(owner("cpu"))
    assert events == ["reshard"]


def test_offloaded_shards_are_pinned_for_a_device_only():
    for kind, pinned in (("cuda", True), ("cpu", False)):
        layout = Layout(mesh=SimpleNamespace(device_type=kind))
        assert parallelize.offload_policy(layout, True).pin_memory is pinned


# Processes


def note_process_group(events, monkeypatch):
    """Notes what is done to a device and to NCCL where four processes share two devices."""
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: events.append(("device", device)))

    def init(backend, **others):
        events.append(("init", backend, others.get("device_id")))

    distributed = torch.distributed
    monkeypatch.setattr(distributed, "init_process_group", init)
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: events.append("destroy"))
    monkeypatch.setattr(
        distributed, "new_group", lambda backend, timeout: events.append(("group", backend))
    )


@pytest.fixture
def parallel_run(events, monkeypatch):
    """Begins a run of two replicas of two processes each, as the last of them."""
    note_process_group(events, monkeypatch)

    class Mesh(dict):
        def __missing__(self, name):
            return SimpleNamespace(get_group=lambda: name)

    def mesh(kind, sides, mesh_dim_names):
        events.append(("mesh", kind, sides))
        return Mesh()

    monkeypatch.setattr(torch.distributed.device_mesh, "init_device_mesh", mesh)
    monkeypatch.setattr(process_group, "met", lambda rank, world: "store")
    parallel = SimpleNamespace(name="hsdp", replicas=2, sync="every")
    liveness = SimpleNamespace(report_phase=lambda *_: None)
    return lambda layout: process_group.processes(parallel, CUDA, layout, liveness)


def test_a_process_takes_its_device_before_nccl_and_the_mesh(events, parallel_run):
    """NCCL makes its communicator on the current device. `device_id` is not given: the groups of
    the mesh would come of `split_group` then (tests/benchmarks/results/gpu.md)."""
    layout = Layout(rank=3, world=4)
    with parallel_run(layout):
        events.append("run")
    assert events == [
        ("device", 1),
        ("init", "cpu:gloo,cuda:nccl", None),
        ("mesh", "cuda", (2, 2)),
        ("group", "gloo"),
        "run",
        "destroy",
    ]
    assert layout.replicas == "replica"


@pytest.mark.parametrize("error, ends", [(ValueError, True), (RuntimeError, False)])
def test_an_error_of_one_process_waits_for_no_sum_of_the_others(error, ends, events, parallel_run):
    """NCCL's end waits for sums under way, and the others wait in one for this process. Mistakes,
    which are ValueErrors, all processes know of."""
    with pytest.raises(error), parallel_run(Layout(rank=3, world=4)):
        raise error
    assert ("destroy" in events) is ends


def test_the_doctor_takes_its_device_as_a_run_does(events, monkeypatch):
    note_process_group(events, monkeypatch)
    monkeypatch.setattr(several, "met", lambda rank, world: "store")
    device = several.local_device()
    with several.process_group(3, 4, device):
        pass
    assert device == SECOND
    assert events == [("device", SECOND), ("init", "cpu:gloo,cuda:nccl", None), "destroy"]


def test_a_bandwidth_is_measured_between_two_waits(events, monkeypatch):
    """A sum returns before the device has summed."""
    full = torch.full
    monkeypatch.setattr(torch, "full", lambda size, value, device: full((4,), 1.0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("wait"))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: events.append("sum"))
    monkeypatch.setattr(
        several.time, "perf_counter", lambda: events.append("clock") or float(len(events))
    )
    several.check_all_reduce(0, 1, CUDA)
    assert events == ["wait", "clock", "sum", "wait", "clock"] * (1 + several.ROUNDS)


# Random numbers


@pytest.fixture
def generators(events, monkeypatch):
    """Generators of CUDA devices: each state that is asked for is another one."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def get(device="cuda"):
        events.append(("get", str(device)))
        return torch.tensor([len(events)])

    def put(state, device="cuda"):
        events.append(("set", str(device), int(state)))

    monkeypatch.setattr(torch.cuda, "get_rng_state", get)
    monkeypatch.setattr(torch.cuda, "set_rng_state", put)


def test_the_generator_is_that_of_the_device_of_the_passes(events, generators):
    set_random_state(random_state(SECOND))
    assert events == [("get", "cuda:1"), ("set", "cuda:1", 1)]
    events.clear()
    # A checkpoint is of the current device, whichever number that has after a restart.
    saved = random_state()
    set_random_state(saved)
    assert saved.keys() == {"cpu", "cuda"}
    assert events == [("get", "cuda"), ("set", "cuda", 1)]


def test_a_device_that_is_not_in_use_is_left_alone(events, generators, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert random_state().keys() == {"cpu"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    set_random_state({"cpu": torch.get_rng_state(), "cuda": torch.tensor([1])})
    assert events == []


@pytest.mark.parametrize("path, passes", [("full", 2), ("functional", 2), ("logit", 3)])
def test_all_passes_of_a_step_begin_with_one_state_of_the_device(
    path, passes, events, generators, monkeypatch
):
    net = GPT(GPTConfig(vocab_size=32, max_length=8, num_layers=1, num_heads=2, width=16))
    optimizer = torch.optim.AdamW(net.parameters())
    rule = SharpnessAware(net, optimizer, rho=0.1, path=path, cotangent="rebuild")
    # The model is on the CPU, and its rule asks for the generator of cuda:1.
    monkeypatch.setattr(
        sharpness, "random_state", lambda device: random_state({rule.device: SECOND}[device])
    )
    tokens = torch.arange(16).reshape(2, 8)
    rule.gradient([(tokens, tokens + 1)])
    assert events == [("get", "cuda:1"), *[("set", "cuda:1", 1)] * passes]


# Precision


@contextmanager
def restored_switches():
    """Puts torch's switches of fp32 back as a new process has them."""
    try:
        yield
    finally:
        torch.backends.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True
        for switch in float32_switches()[:2]:
            switch.fp32_precision = "none"


def set_old():
    torch.set_float32_matmul_precision("high")


def set_new():
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def set_for_all():
    torch.backends.fp32_precision = "tf32"


def set_convolutions():
    torch.backends.cudnn.conv.fp32_precision = "ieee"


@pytest.mark.parametrize(
    "choose, is_fast",
    [
        (lambda: None, False),
        (set_old, True),
        (set_new, True),
        (set_for_all, True),
        (set_convolutions, False),
    ],
)
def test_tf32_is_off_meanwhile_however_it_was_set(choose, is_fast):
    with restored_switches():
        choose()
        before = [switch.fp32_precision for switch in float32_switches()]
        assert has_fast_products(CUDA) is rounds(CUDA) is is_fast
        with ieee_products():
            assert not has_fast_products(CUDA)
            assert [switch.fp32_precision for switch in float32_switches()] == ["ieee"] * 4
            # torch's compiler reads the old switches, and they raise where the two differ.
            assert torch.get_float32_matmul_precision() == "highest"
            assert torch.backends.cudnn.allow_tf32 is False
        assert [switch.fp32_precision for switch in float32_switches()] == before
    assert torch.get_float32_matmul_precision() == "highest"


def test_autocast_is_of_the_device_and_for_bf16_only(events, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda kind, **given: events.append((kind, given)))
    model.device.autocast(CUDA, torch.bfloat16)
    model.device.autocast(CUDA, torch.float32)
    assert events == [
        ("cuda", {"dtype": torch.bfloat16, "enabled": True}),
        ("cuda", {"dtype": torch.float32, "enabled": False}),
    ]


def test_compiled_attention_leaves_its_kernel_where_masks_must_be_the_same():
    """torch.compile fixes the kernel of attention when it compiles; no switch changes it later."""
    compiled = []

    def count(graph, example):
        compiled.append(graph)

        def run(*args):
            compiled.append("ran")
            return graph(*args)

        return run

    attend = torch.compile(
        lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), backend=count
    )
    q = torch.ones(1, 1, 4, 8)
    attend(q)
    assert compiled[1:] == ["ran"]
    with same_masks(nn.Dropout(0.1), CUDA):
        assert not torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.math_sdp_enabled()
        attend(q)
    assert compiled[1:] == ["ran"]
    assert torch.backends.cuda.flash_sdp_enabled()
    attend(q)
    assert compiled[1:] == ["ran", "ran"]
    # Where nothing is dropped the passes run as they do in training.
    with same_masks(nn.Dropout(0.0), CUDA):
        attend(q)
    assert compiled[1:] == ["ran", "ran", "ran"]


def test_masks_are_drawn_in_fp32_where_they_must_be_the_same(events, monkeypatch):
    """CUDA draws eight numbers of bf16 from what are four of fp32."""
    draw = F.dropout

    def note(x, *others):
        events.append(x.dtype)
        return draw(x, *others)

    monkeypatch.setattr(F, "dropout", note)
    dropout = nn.Dropout(0.5)
    x = torch.ones(8, dtype=torch.bfloat16)
    with same_masks(nn.Sequential(dropout), CUDA):
        assert dropout(x).dtype == torch.bfloat16
        dropout(x.double())
    dropout(x)
    assert events == [torch.float32, torch.float64, torch.bfloat16]


# Attention and the head


def test_groups_of_heads_keep_a_fused_kernel_in_fp32(monkeypatch):
    """On CUDA torch has no fused kernel of fp32 for fewer heads of keys than of queries."""
    for kind, dtype, fits in (
        ("cuda", torch.float32, False),
        ("cuda", torch.bfloat16, True),
        ("cpu", torch.float32, True),
    ):
        q = SimpleNamespace(device=torch.device(kind), dtype=dtype)
        assert gpt.fused_kernel_takes_groups(q) is fits

    config = GPTConfig(
        vocab_size=32, max_length=8, num_layers=1, num_heads=4, num_kv_heads=2, width=32
    )
    attention = gpt.Attention(config)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 8, 8, generator=generator) for heads in (4, 2, 2))
    grouped = attention.attend(q, k, v, True)
    given = []
    attend = F.scaled_dot_product_attention

    def note(q, k, v, **options):
        given.append((k.shape[1], v.shape[1], options["enable_gqa"]))
        return attend(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", note)
    monkeypatch.setattr(gpt, "fused_kernel_takes_groups", lambda q: False)
    torch.testing.assert_close(attention.attend(q, k, v, True), grouped)
    assert given == [(4, 4, False)]


def test_the_kernel_is_launched_on_the_device_of_the_logits(events, monkeypatch):
    pytest.importorskip("triton", reason="Triton is for Linux on x86-64")
    from model import fused_head

    class Kernel:
        def __getitem__(self, grid):
            def launch(z, targets, factor, *others, **constants):
                events.append(("launch", grid, targets.stride(), factor.stride()))

            return launch

    def exchange(device):
        events.append(("device", device))
        return 0

    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    monkeypatch.setattr(fused_head, "row_kernel", Kernel())
    labels = chunked_head.Labels(torch.zeros(5, 2).long()[:, 0], torch.zeros(5, 2)[:, 0])
    head = chunked_head.HeadConfig(30, None, 0.0)
    fused_head.rows_of_logits(on_cuda(torch.zeros(5, 32)), labels, head, True)
    assert events == [("device", 1), ("launch", (5,), (1,), (1,)), ("device", 0)]


def test_without_what_builds_kernels_all_of_it_is_eager(monkeypatch, capsys, tmp_path):
    """Neither Triton's kernel of the head nor compiled blocks can be built without a C compiler."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    missing = model.device.missing_for_kernels()
    assert "C compiler" in missing
    net = GPT(GPTConfig(vocab_size=32, max_length=8, num_layers=1, num_heads=2, width=16))
    parallelize.parallelize(net, "auto", False, CUDA)
    assert net.blocks[0]._compiled_call_impl is None
    assert "C compiler here; running eagerly" in capsys.readouterr().err

    (tmp_path / "gcc").write_text("#!/bin/sh\n")
    (tmp_path / "gcc").chmod(0o755)
    assert "C compiler" not in model.device.missing_for_kernels()
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "C compiler" in model.device.missing_for_kernels()

    z = on_cuda(torch.zeros(2, 4))
    for has_kernels in (False, True):
        monkeypatch.setattr(chunked_head, "HAS_KERNELS", has_kernels)
        assert chunked_head.is_fused(z) is has_kernels
        assert not chunked_head.is_fused(on_cuda(torch.zeros(2, 4).double()))


def test_compiled_dropout_has_one_mask_in_every_kernel(events, monkeypatch):
    """By default torch 2.13 has two ways to draw one, and the shape of a kernel chooses."""
    monkeypatch.setattr(nn.Module, "compile", lambda _, **given: events.append(given))
    monkeypatch.setattr(parallelize, "missing_for_kernels", list)
    given = {"options": {"align_random_eager": True}}
    for dropout, device, expected in ((0.1, "cuda", given), (0.0, "cuda", {}), (0.1, "cpu", {})):
        shape = GPTConfig(40, 16, 1, 2, 16, dropout=dropout)
        parallelize.parallelize(GPT(shape), "block", False, torch.device(device))
        assert events.pop() == expected
    # The compiler knows the option.
    torch.compile(lambda x: x + 1, **given)(torch.ones(2))


# Memory and the optimiser


def test_free_memory_is_what_the_device_has_and_what_torch_holds_unused(monkeypatch):
    asked = []

    def figure(value):
        return lambda device: asked.append(device) or value

    monkeypatch.setattr(torch.cuda, "mem_get_info", figure((1000, 5000)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", figure(300))
    monkeypatch.setattr(torch.cuda, "memory_allocated", figure(100))
    assert free_memory(SECOND) == 1200
    assert asked == [SECOND] * 3


def test_restored_counts_of_steps_lie_with_their_parameters():
    """The fused AdamW reads them on the device."""
    elsewhere = nn.Linear(2, 2, bias=False, device="meta")
    optimizer = torch.optim.AdamW(elsewhere.parameters())
    tensors = {"weight.step": torch.tensor(3.0), "weight.exp_avg": torch.ones(2, 2)}
    load_state_tensors(elsewhere, optimizer, tensors)
    found = optimizer.state[elsewhere.weight]
    assert found["step"].device == found["exp_avg"].device == elsewhere.weight.device
    assert found["step"].dtype == torch.float32


def test_determinism_is_asked_for_before_cublas_is_used(monkeypatch):
    """cuBLAS reads its workspace once, when its first product is taken."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    asked = []
    monkeypatch.setattr(
        torch,
        "use_deterministic_algorithms",
        lambda on: asked.append((on, os.environ.get("CUBLAS_WORKSPACE_CONFIG"))),
    )
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    model.device.seed_everything(1, 0, True)
    assert asked == [(True, ":4096:8")] and torch.backends.cudnn.benchmark is False
