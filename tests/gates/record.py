"""What a user sees of the product, in a form that can be compared: names, keys, plans, and the
numbers of every rule.

    python tests/gates/record.py [names keys plans metrics_1 metrics_2]

writes NAME.json for each name, here. tests/test_gates.py holds the product against them: record
them anew only where a change is meant, and say so in the commit."""

import hashlib
import json
import platform
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
RULES = sorted(path.stem for path in (ROOT / "conf/optim").glob("*.yaml"))
# The path is relative to the project, so that the run's name is the same everywhere.
RUN = [
    "model=tiny",
    "model.num_layers=2",
    "model.width=32",
    "model.max_length=32",
    "model.dropout=0.1",
    "batch.length=32",
    "batch.sequences=8",
    "batch.micro=1",
    "schedule.steps=20",
    "data=text",
    "data.path=tests/gates/licence.txt",
    "data.validation_split=tail",
    "data.name=licence",
    "device=cpu",
    "precision=fp32",
    "compile=none",
    "deterministic=true",
    "tracking.mode=off",
    "tracking.every=1",
    "evaluation.every=10",
    "evaluation.baselines=false",
    "evaluation.sample=0",
]
WITHOUT_FILES = (
    "data=text",
    "data=tokens",
    "data=hub",
    "experiment=shakespeare_char",
    "experiment=shakespeare_char_cpu",
)
PLANS = {
    "quickstart": ["experiment=quickstart", "precision=fp32"],
    "GPT-2": [
        "experiment=gpt2_124m_openwebtext",
        "device_memory=80",
        "device=cpu",
        "precision=bf16",
    ],
    "Functional-SAM on C4": [
        "experiment=functional_sam_c4",
        "device_memory=80",
        "device=cpu",
        "precision=bf16",
    ],
    "1208M in shards": [
        "model=nanodo_1208m",
        "schedule=chinchilla",
        "tokenizer=bpe",
        "tokenizer.vocab_size=32768",
        "batch.length=2048",
        "batch.sequences=256",
        "batch.micro=1",
        "parallel=fsdp",
        "parallel.processes=64",
        "device_memory=80",
        "device=cpu",
        "precision=bf16",
        "optim=preconditioned_functional_sam",
        "optim.cotangent=rebuild",
    ],
    "replicas": [
        "model=nanodo_118m",
        "parallel=hsdp",
        "parallel.processes=8",
        "parallel.replicas=2",
        "optim=sam",
        "batch.sequences=64",
        "device_memory=80",
        "device=cpu",
        "precision=bf16",
    ],
    "matched": [
        "model=nanodo_500k",
        "optim=look_sam",
        "optim.compute_matched=true",
        "schedule.steps=1000",
        "device=cpu",
        "precision=fp32",
    ],
}


def names() -> dict[str, str]:
    """Returns the name of a run of every preset."""
    from conf.overrides import groups
    from launch.config import compose
    from launch.run.identity import run_name

    found = {}
    for group, choices in groups().items():
        for choice in choices:
            files = ["data.path=FILES"] if f"{group}={choice}" in WITHOUT_FILES else []
            found[f"{group}={choice}"] = run_name(compose([f"{group}={choice}", *files]))
    return found


def keys() -> dict[str, list[Any]]:
    """Returns type, default and choices of every key."""
    from conf.key import type_name
    from conf.keys import KEYS, lookup
    from launch.config import compose

    config = compose([])
    choices = {name: list(entry.metadata.get("choices", ())) for name, entry in KEYS.items()}
    return {
        name: [type_name(entry), lookup(config, name), choices[name]]
        for name, entry in KEYS.items()
    }


def plans() -> dict[str, list[str]]:
    """Returns the lines that plan_only=true prints of some configurations."""
    from launch.config import compose
    from launch.plan.description import describe
    from launch.plan.plan import make_plan
    from launch.run.identity import run_name

    found = {}
    for name, overrides in PLANS.items():
        config = compose([*overrides, "plan_only=true"])
        found[name] = describe(config, make_plan(config), run_name(config)).splitlines()
    return found


def metrics(world: int) -> dict[str, dict[str, Any]]:
    """Trains 20 steps by every rule on some processes; returns digests of its rows without times
    and of its weights, and the last row."""
    from tests.runs import Server

    servers = [Server() for _ in range(world)]
    found = {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            for rule in RULES:
                run = Path(folder) / rule
                train(
                    servers,
                    [*RUN, f"optim={rule}", f"dir={run}", f"data.cache={folder}/cache"],
                    Path(folder),
                )
                found[rule] = described(run)
    finally:
        for server in servers:
            server.close()
    return found


def train(servers: list[Any], overrides: list[str], folder: Path) -> None:
    """Trains one run on as many processes as there are servers."""
    variables: dict[str, str] = {}
    if len(servers) > 1:
        overrides = [*overrides, "parallel=fsdp"]
        variables = {
            "WORLD_SIZE": str(len(servers)),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(free_port()),
        }
    started = []
    for rank, server in enumerate(servers):
        own = variables | {"RANK": str(rank)} if variables else {}
        started.append(server.start(*overrides, output=folder / f"{rank}.log", variables=own))
    codes = [process.wait() for process in started]
    assert not any(codes), started[0].said()


def free_port() -> int:
    """Returns a port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def described(run: Path) -> dict[str, Any]:
    """Returns digests of a finished run's rows and weights, and its last row."""
    from tests.runs import rows, tensors

    written = rows(run)
    weights = hashlib.sha256()
    for name, tensor in sorted(tensors(run, 20).items()):
        if name.startswith("model/"):
            weights.update(name.encode())
            weights.update(tensor.numpy().tobytes())
    return {
        "rows": hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest(),
        "weights": weights.hexdigest(),
        "last": written[-1],
    }


def machine() -> list[str]:
    """Returns what rounding depends on: processors with other instructions sum in another order."""
    import torch

    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next(
        (
            line.split(":")[1].strip()
            for line in cpuinfo.splitlines()
            if line.startswith("model name")
        ),
        "",
    )
    return [platform.machine(), model, torch.backends.cpu.get_cpu_capability(), torch.__version__]


MAKERS: dict[str, Callable[[], dict[str, Any]]] = {
    "names": names,
    "keys": keys,
    "plans": plans,
    "metrics_1": lambda: {"machine": machine(), **metrics(1)},
    "metrics_2": lambda: {"machine": machine(), **metrics(2)},
}

if __name__ == "__main__":
    for wanted in sys.argv[1:] or MAKERS:
        Path(__file__).with_name(f"{wanted}.json").write_text(
            json.dumps(MAKERS[wanted](), indent=1, sort_keys=True) + "\n"
        )
