"""The keys of the text and its tokenizer: `data.*` and `tokenizer.*`."""

from dataclasses import dataclass
from typing import Any

from conf.key import key


@dataclass
class TokenizerConfig:
    """The tokenizer: how text becomes ids."""

    name: str = key(
        "bytes",
        "bytes: 256 + end of text; bpe: trained on the corpus; gpt2: tiktoken's own; hf: of a"
        " Hugging Face folder",
        choices=("bytes", "bpe", "gpt2", "hf"),
    )
    vocab_size: int = key(
        4096,
        "entries of a trained bpe, end of text included",
        low=258,
        high=2**20,
        read_when=("tokenizer.name", ("bpe",)),
    )
    train_megabytes: float = key(
        100.0,
        "text the bpe is trained on, from the start of each training source",
        above=0.0,
        high=1e9,
        read_when=("tokenizer.name", ("bpe",)),
    )
    path: str | None = key(
        None,
        "hf: folder or hub name, default init.hf; gpt2: its ranks or their folder, default fetched"
        " once",
        mutable=("tokenizer.name", ("gpt2",)),
        read_when=("tokenizer.name", ("gpt2", "hf")),
        path=True,
        place=True,
    )


@dataclass
class SourceConfig:
    """One entry of data.sources: file, glob or list of them, and its share of the training
    sequences."""

    path: Any
    weight: float = 1.0


@dataclass
class DataConfig:
    """Where text comes from, and what of it is held out."""

    name: str = key("stdlib", "name of the corpus, used in the run's name")
    source: str = key(
        "stdlib", "where text comes from", choices=("stdlib", "text", "tokens", "hub")
    )
    path: Any = key(
        None,
        "file, folder, glob or list of .txt, .jsonl, .parquet; tokens: of .bin; hub: a dataset's"
        " name, or a folder",
        path=True,
        place=True,
        read_when=("data.source", ("text", "tokens", "hub")),
    )
    sources: Any = key(
        None,
        "several weighted sources, name: {path, weight}; instead of data.path",
        place=True,
        read_when=("data.source", ("text", "tokens")),
    )
    config: str | None = key(
        None, "configuration of the dataset, as 'en' of C4", read_when=("data.source", ("hub",))
    )
    split: str = key(
        "train",
        "split of the dataset that is trained on; several as 'a+b'",
        read_when=("data.source", ("hub",)),
    )
    revision: str | None = key(
        None,
        "branch, tag or commit of the dataset; default what main is at first",
        read_when=("data.source", ("hub",)),
    )
    documents: int | None = key(
        None,
        "train on the first so many rows of the split only",
        low=1,
        high=10**12,
        read_when=("data.source", ("hub",)),
    )
    field: str = key(
        "text",
        "field of rows (.jsonl, .parquet, hub) that holds the text",
        read_when=("data.source", ("text", "hub")),
    )
    separator: str | None = key(
        None,
        "line that ends a document in .txt files; default: a file is a document",
        read_when=("data.source", ("text",)),
        text=True,
    )
    validation: Any = key(
        None,
        "validation sets, name: file, glob or list; hub: a split, or name: split; default:"
        " held out",
        read_when=("data.source", ("text", "tokens", "hub")),
        path=True,
        place=True,
    )
    validation_fraction: float = key(
        0.05,
        "share of the text that is held out where no validation set is given",
        above=0.0,
        high=0.5,
    )
    validation_split: str = key(
        "documents",
        "hold out random documents, or the tail of the text (as nanoGPT does, and data=tokens)",
        choices=("documents", "tail"),
        read_when=("data.source", ("stdlib", "text")),
    )
    cache: str = key(
        "~/.cache/flatgpt",
        "folder of prepared shards and trained tokenizers",
        mutable=True,
        path=True,
    )
    workers: int | None = key(
        None, "processes that prepare text; default one per core", low=1, high=2**12, mutable=True
    )
    bad_rows: str = key(
        "error",
        "rows that cannot be read (null, no UTF-8, no JSON): stop and name the row, or skip and"
        " count them",
        choices=("error", "skip"),
        mutable=True,
        read_when=("data.source", ("text", "hub")),
    )
    verify_days: float = key(
        7.0,
        "days after which the content of shards is verified again, at a start; 0: at every start",
        low=0.0,
        high=1e6,
        mutable=True,
    )
