"""What four processes save and load together, run under torchrun by test_sharded_checkpoint.py.

    torchrun --nproc-per-node 4 tests/checkpoint_ranks.py FOLDER

FOLDER/single is the run of one process. The processes load it into four shards and into two
replicas of two, save each of these, and load everything into either. FOLDER/found.json says what
came of that, process by process."""

import json
import resource
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from conf.rule import OptimConfig
from data.shards import Corpus
from data.tokenizer import bytes_tokenizer
from launch.checkpoint import step_folder
from launch.checkpoint.resume import Trained as Restored
from launch.checkpoint.resume import restore, tensors_of
from launch.checkpoint.saver import Saver
from launch.checkpoint.step_folder import use_newest
from launch.track.progress import Progress, State
from model import GPT, GPTConfig
from model.checkpoint import Part, open_checkpoint
from model.parallelize import shard
from model.processes import Layout
from model.sharding import local, region_of, shard_of
from optim import SharpnessAware, build_optimizer
from optim.adamw import state_tensors

TOKENIZER = bytes_tokenizer()
# vectors of 9 leave the last of four processes with empty shards
SHAPE = GPTConfig(TOKENIZER.vocab_size, 9, 1, 3, 9)
CORPUS = Corpus(Path(), {}, TOKENIZER, {}, {}, None, "fingerprint")


class Trained:
    """A model, its optimiser, and a rule that remembers two tensors for each weight."""

    def __init__(self, layout: Layout, seed: int) -> None:
        self.layout = layout
        with torch.device("meta"):
            self.model = GPT(SHAPE)
        if layout.mesh is not None:
            shard(self.model, layout, reshard_after_forward=True)
        self.model.to_empty(device="cpu")
        self.model.init_weights(seed)
        self.optimizer = build_optimizer(self.model, OptimConfig(lr=1e-2))
        self.rule = SharpnessAware(
            self.model, self.optimizer, rho=0.05, direction="friendly", combine="reuse", period=2
        )
        torch.manual_seed(seed + layout.rank)

    def step(self) -> None:
        """One step, the same on every process."""
        tokens_BxT = torch.arange(18).view(2, 9)
        self.rule.gradient([(tokens_BxT, tokens_BxT + 1)])
        self.optimizer.step()
        self.optimizer.zero_grad()

    def whole(self) -> dict[str, Tensor]:
        """Full copies of all tensors by "<group>/<name>", on every process, and its own random
        state."""
        groups = {
            "model": dict(self.model.named_parameters()),
            "optimizer": state_tensors(self.model, self.optimizer),
            "rule": self.rule.state_dict(),
        }
        found = {
            f"{group}/{name}": full(value)
            for group, tensors in groups.items()
            for name, value in tensors.items()
        }
        return found | {"random": torch.get_rng_state()}

    def take(self, run: Path, said: Callable[[str], Any] = print) -> Progress:
        """What a run takes over from its newest checkpoint."""
        state = use_newest(
            run,
            lambda saved: restore(
                saved, Restored(self.model, self.optimizer, self.rule, CORPUS, self.layout)
            ),
            self.layout,
            said,
        )
        assert state
        return state.progress

    def begin_save(self, saver: Saver, step: int) -> None:
        """As a run does."""
        state = State(
            step, Progress(step=step), asdict(SHAPE), TOKENIZER.hash, CORPUS.fingerprint, {}
        )
        saver.begin(
            tensors_of(self.model, self.optimizer, self.rule, self.layout),
            asdict(state),
            TOKENIZER,
            9,
            [],
        )


def full(tensor: Tensor) -> Tensor:
    """A full copy."""
    return (
        tensor.detach().full_tensor().clone()
        if isinstance(tensor, DTensor)
        else tensor.detach().clone()
    )


def differing(ones: dict[str, Tensor], others: dict[str, Tensor]) -> list[str]:
    """The names of tensors that are not the same, bit for bit."""
    return sorted(
        name
        for name in ones.keys() | others.keys()
        if not (name in ones and name in others and same(ones[name], others[name]))
    )


def same(one: Tensor, other: Tensor) -> bool:
    """Dtype, shape and numbers."""
    return one.dtype == other.dtype and torch.equal(one, other)


def save_and_load(folder: Path, layouts: dict[str, Layout]) -> dict[str, Any]:
    """Every layout takes over the run of one process, trains, saves and changes what it saved at
    once; then everybody loads everything."""
    found, one = {}, Trained(Layout(), 5)
    one.take(folder / "single")
    references = {"single": one.whole()}
    for seed, (kind, layout) in enumerate(layouts.items()):
        trained, saver = Trained(layout, seed), Saver(folder / kind, layout)
        trained.take(folder / "single")
        found[f"single to {kind}"] = differing(
            trained.whole(),
            references["single"] | ({} if layout.main else {"random": torch.get_rng_state()}),
        )
        for step in (3, 4, 5):  # the later ones are copied to where the first was
            torch.manual_seed(10 * step + layout.rank)
            if step > 3:
                trained.step()
            references[kind] = trained.whole()
            trained.begin_save(saver, step)
            with torch.no_grad():
                for group in tensors_of(
                    trained.model, trained.optimizer, trained.rule, layout
                ).values():
                    for tensor in group.values():
                        local(tensor).logical_not_()
            found[f"{kind} saved {step}"] = saver.wait()
            trained.take(folder / kind)
    for source in layouts:
        for target, layout in layouts.items():
            trained = Trained(layout, 7)
            trained.take(folder / source)
            found[f"{source} to {target}"] = differing(trained.whole(), references[source])
    return found


def all_kinds(folder: Path, layouts: dict[str, Layout]) -> list[str]:
    """Numbers and tensors of several types, cut along either dimension; those that another mesh,
    cutting along the other, does not find again."""
    layout, other = layouts.values()
    wholes = {
        f"{dtype} {shape} {dim}": (
            (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 9).to(dtype)
        )
        for dtype in (torch.bfloat16, torch.uint8, torch.bool, torch.int64, torch.float64)
        for shape, dim in (((), None), ((3,), 0), ((5, 7), 0), ((5, 7), 1), ((2, 6, 3), 1))
    }
    tensors: dict[str, Tensor] = {
        name: distribute_tensor(whole, layout.mesh, [Shard(int(name[-1]))]) if whole.ndim else whole
        for name, whole in wholes.items()
    }
    parts = {
        name: Part(local(tensor).contiguous(), tuple(side.start for side in region_of(tensor)))
        for name, tensor in tensors.items()
        if layout.writes_to_checkpoint(tensor)
    }
    path = step_folder.save(
        folder / "kinds", {"model": parts}, {"step": 1}, TOKENIZER, 1, [], layout
    )
    stored = open_checkpoint(path, ("model",), other).tensors["model"]
    missed = wholes.keys() ^ stored.keys()
    for name, whole in wholes.items():
        across = (
            distribute_tensor(whole, other.mesh, [Shard(whole.ndim - 1 - int(name[-1]))])
            if whole.ndim
            else whole
        )
        if not same(stored[name][...], whole) or not same(
            shard_of(stored[name], across), local(across)
        ):
            missed.add(name)
    return sorted(missed)


def damage(folder: Path, layout: Layout) -> list[Any]:
    """A newer checkpoint with a changed bit in the part of the third process: the step that this
    process goes on from, and what it says."""
    if layout.main:
        newest = shutil.copytree(
            folder / "fsdp/checkpoints/step_00000005", folder / "fsdp/checkpoints/step_00000009"
        )
        file = newest / "model-00003-of-00004.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    dist.barrier()
    said: list[str] = []
    return [Trained(layout, 1).take(folder / "fsdp", said.append).step, said]


def refused(folder: Path, layout: Layout) -> list[Any]:
    """The disk of the third process is full, and later has room again: what every save says, and
    the checkpoints there are then."""
    trained, saver = Trained(layout, 1), Saver(folder / "refused", layout)
    trained.step()
    limits: Any = resource.getrlimit(resource.RLIMIT_FSIZE)
    answers: list[Any] = []
    for step, limit in ((1, limits[0]), (2, 1000), (3, limits[0])):
        if layout.rank == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        trained.begin_save(saver, step)
        answers.append(
            [saver.wait(), sorted(path.name for path in (folder / "refused/checkpoints").iterdir())]
        )
        dist.barrier()  # the next save is seen by nobody yet
    return answers


def apart(folder: Path, layout: Layout) -> str | None:
    """The second process has a disk of its own by the same name: what the save says."""
    saver = Saver(folder / ("elsewhere" if layout.rank == 1 else "here"), layout)
    Trained(layout, 1).begin_save(saver, 1)
    return saver.wait()


def main(folder: Path) -> None:
    """Does all of it and writes what came of it."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    saving, mesh = (
        dist.new_group(backend="gloo"),
        init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard")),
    )
    layouts = {
        "fsdp": Layout(rank, world, init_device_mesh("cpu", (world,)), saving=saving),
        "hsdp": Layout(rank, world, mesh["shard"], mesh["replica"].get_group(), saving),
    }
    found = save_and_load(folder, layouts)
    found |= {
        "kinds": all_kinds(folder, layouts),
        "refused": refused(folder, layouts["fsdp"]),
        "apart": apart(folder, layouts["hsdp"]),
    }
    found["damage"] = damage(folder, layouts["fsdp"])
    everyone = layouts["fsdp"].all_gather(found)
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(everyone))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
