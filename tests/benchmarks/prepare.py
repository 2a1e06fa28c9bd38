"""The speed of preparing text, beside a plain loop over tiktoken in one thread.

    python tests/benchmarks/prepare.py --path 'FOLDER/*.txt' [--ranks gpt2.tiktoken] [--separator
    '<|endoftext|>'] [--rounds 3] [--out FILE.md]

Three tokenizers' worth of work on the same text: GPT-2's (skipped without --ranks) and a bpe of
4096 trained on its head, from .txt files (data=text) and, with GPT-2's, from gzipped JSON and from
parquet (data=hub, streamed by `datasets`). Preparing counts all of it: reading, splitting,
encoding, checksums, writing, verifying, looking for leaks. The last two, done again by themselves,
are given as shares of its time: what data.verify_days costs, and what noticing the same text in
training and validation does. The loop encodes the same documents, already in memory, and throws the
ids away. The two take turns in one process, so that the ratio of medians holds while the machine's
speed drifts."""

import argparse
import glob
import gzip
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from conf.text import DataConfig
from data import prepare
from data.corpora import TextCorpus
from data.encode import num_cores
from data.overlap import overlap
from data.tokenizer import RankedTokenizer, gpt2_tokenizer, head, train_bpe


def config(source: str, path: str, cache: str, separator: str | None) -> DataConfig:
    return DataConfig(
        name=source,
        source=source,
        path=path,
        cache=cache,
        separator=separator,
        validation_fraction=0.05,
    )


def seconds_of_preparing(
    data: DataConfig, tokenizer: RankedTokenizer
) -> tuple[float, float, float]:
    """Returns the seconds of preparing into a cache that is empty with a tokenizer that was not
    used before, of verifying the shards again, and of looking for the text of validation in that of
    training."""
    fresh = RankedTokenizer(tokenizer.name, tokenizer.pattern, tokenizer.ranks)
    with tempfile.TemporaryDirectory(dir=data.cache) as cache:
        began = time.perf_counter()
        corpus = prepare(DataConfig(**{**vars(data), "cache": cache}), fresh)
        prepared = time.perf_counter()
        for tokens in [*corpus.train.values(), *corpus.validation.values()]:
            for shard in tokens.shards:
                shard.verify()
        verified = time.perf_counter()
        for tokens in corpus.validation.values():
            overlap(list(corpus.train.values()), tokens)
        return prepared - began, verified - prepared, time.perf_counter() - verified


def seconds_of_loop(texts: list[str], tokenizer: RankedTokenizer) -> float:
    encoding = tokenizer.encoding
    began = time.perf_counter()
    for text in texts:
        encoding.encode_ordinary(text)
    return time.perf_counter() - began


def write_datasets(texts: list[str], folder: Path) -> dict[str, str]:
    """The documents as folders of a dataset: 8 files of gzipped JSON, as C4 has, and of parquet, as
    FineWeb has."""
    folders = {kind: folder / kind for kind in ("gzipped JSON", "parquet")}
    for kind, path in folders.items():
        path.mkdir()
        for index in range(8):
            rows, name = texts[index::8], f"train-{index:05d}-of-00008"
            if kind == "parquet":
                pq.write_table(
                    pa.table({"text": rows, "url": [""] * len(rows)}),
                    path / f"{name}.parquet",
                    row_group_size=1000,
                )
            else:
                lines = "".join(json.dumps({"text": text, "url": ""}) + "\n" for text in rows)
                (path / f"{name}.json.gz").write_bytes(gzip.compress(lines.encode(), 6))
    return {kind: str(path) for kind, path in folders.items()}


def paragraphs(texts: list[str], size: int = 2000) -> list[str]:
    """Documents of a web page's length, cut out of longer ones."""
    return [text[first : first + size] for text in texts for first in range(0, len(text), size)]


def compare(
    label: str, data: DataConfig, tokenizer: RankedTokenizer, texts: list[str], rounds: int
) -> str:
    """A row of the table."""
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    ours, loop, verifying, looking = [], [], [], []
    seconds_of_loop(texts[: len(texts) // 20 + 1], tokenizer)  # warms up
    for _ in range(rounds):
        prepared, verified, looked = seconds_of_preparing(data, tokenizer)
        ours.append(megabytes / prepared)
        verifying.append(verified / prepared)
        looking.append(looked / prepared)
        loop.append(megabytes / seconds_of_loop(texts, tokenizer))
    name = f"{tokenizer.name}-{tokenizer.vocab_size}"
    speeds = [statistics.median(ours), statistics.median(loop)]
    spread = f"{min(ours):.1f} to {max(ours):.1f}"
    again = f"{statistics.median(verifying):.1%} | {statistics.median(looking):.1%}"
    ratio = f"{speeds[0] / speeds[1]:.2f} x"
    return (
        f"| {label} | {name} | {len(texts):,} | {megabytes:.1f} | {speeds[0]:.1f} ({spread}) |"
        f" {speeds[1]:.1f} | {ratio} | {again} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--path", help=".txt files, as a glob; without it there is nothing to measure"
    )
    parser.add_argument(
        "--separator", default="<|endoftext|>", help="line that ends a document in them"
    )
    parser.add_argument("--ranks", help="GPT-2's ranks, as tokenizer.path")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="append the table to this file too")
    arguments = parser.parse_args()
    if not arguments.path or not glob.glob(arguments.path):
        print("skipped: no text; give --path")
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = config("text", arguments.path, folder, arguments.separator)
        texts = [text.text for piece in TextCorpus(data).pieces() for text in piece.texts()]
        gpt2 = gpt2_tokenizer(arguments.ranks, Path(folder)) if arguments.ranks else None
        for tokenizer in (gpt2, train_bpe(head(texts, 20_000_000), 4096)):
            if tokenizer:
                rows.append(compare("text: .txt", data, tokenizer, texts, arguments.rounds))
                print(rows[-1], flush=True)
        if gpt2:
            pages = paragraphs(texts)
            for kind, path in write_datasets(pages, Path(folder)).items():
                rows.append(
                    compare(
                        f"hub: {kind}",
                        config("hub", path, folder, None),
                        gpt2,
                        pages,
                        arguments.rounds,
                    )
                )
                print(rows[-1], flush=True)
    used = ", ".join(
        f"{name} {version(name)}" for name in ("tiktoken", "datasets", "pyarrow", "numpy")
    )
    report = [
        (
            f"{date.today()}; {num_cores()} cores ({platform.machine()}), Python"
            f" {platform.python_version()}, {used}"
        ),
        "",
        (
            "| source | tokenizer | documents | MB | prepared, MB/s (lowest to highest) | plain"
            " loop, MB/s | ratio | verifying again | leaks |"
        ),
        "|---|---|---|---|---|---|---|---|---|",
        *rows,
    ]
    print("\n".join(["", *report]))
    if arguments.out:
        with open(arguments.out, "a") as file:
            file.write("\n".join(["", *report, ""]))


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    main()
