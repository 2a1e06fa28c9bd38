"""The tokenizer that a configuration names: one that is known, or a bpe that is found in the cache
or trained now."""

import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from conf.text import TokenizerConfig
from data.cache_folders import folder_by_content, locked
from data.encode import worker_processes
from data.hf_folder import find_folder, read_tokenizer
from data.shards import key
from data.sources import AnyCorpus
from data.tokenizer import SIZES, Tokenizer, bytes_tokenizer, gpt2_tokenizer, head, train_bpe

# Seconds between lines while a tokenizer is trained.
SIGN_OF_LIFE = 30.0


def known_tokenizer(config: TokenizerConfig, cache: Path) -> Tokenizer | None:
    """Returns the tokenizer of a configuration where no text has a part in it; None for a bpe of
    our own."""
    if config.name == "bytes":
        return bytes_tokenizer()
    if config.name == "gpt2":
        return gpt2_tokenizer(config.path, cache)
    if config.name == "hf":
        return configured_hf(config)
    return None


def configured_hf(config: TokenizerConfig) -> Tokenizer:
    """Returns the tokenizer of tokenizer=hf. Raises ValueError where it names none, or none that
    can be read."""
    if config.path is None:
        raise ValueError(
            "tokenizer.path=null names no tokenizer; with tokenizer=hf set tokenizer.path=FOLDER,"
            " or init.hf=FOLDER to take its own"
        )
    return read_tokenizer(find_folder(config.path))


def vocabulary(config: TokenizerConfig) -> int:
    """Returns the size of the vocabulary that a configuration will come to."""
    if config.name == "hf":
        return configured_hf(config).vocab_size
    return SIZES.get(config.name, config.vocab_size)


def tokenizer_of_shard(config: TokenizerConfig, cache: Path, shard: Path) -> Tokenizer:
    """Returns the tokenizer of a configuration; a bpe out of the prepared corpus that a shard is
    of. Raises ValueError where it is not there, or has another vocabulary."""
    if known := known_tokenizer(config, cache):
        return known
    # A shard lies in <corpus>/train/<source>, or was copied beside its tokenizer.
    above = shard.parents[:3]
    folder = next((folder for folder in above if (folder / "tokenizer.json").exists()), None)
    if folder is None:
        raise ValueError(
            f"tokenizer=bpe: there is no tokenizer.json by {shard}; put the one that it was made"
            " with beside it"
        )
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(
            f"tokenizer.vocab_size={config.vocab_size} but {folder / 'tokenizer.json'} has"
            f" {tokenizer.vocab_size}; set that"
        )
    return tokenizer


def tokenizer_of_text(
    text: AnyCorpus, digests: dict[str, str], config: TokenizerConfig, cache: Path
) -> Tokenizer:
    """Returns the tokenizer of a configuration; a bpe out of the cache, or trained now on the head
    of each source's training text.

    Args:
        text: the corpus
        digests: sha256 of each of its files by path
        config: the configuration
        cache: the folder of the cache
    """
    if known := known_tokenizer(config, cache):
        return known

    def name(identity: Any) -> Path:
        return cache / f"bpe-{key([identity, config.vocab_size, config.train_megabytes])}"

    # The text is part of the name: another text trains another tokenizer.
    folder = folder_by_content(text, digests, name, "tokenizer.json")
    if not (folder / "tokenizer.json").exists():
        with locked(folder):
            # Another process may have trained it while this one waited.
            if not (folder / "tokenizer.json").exists():
                train_apart(text, config).save(folder)
    return Tokenizer.load(folder)


def train_apart(text: AnyCorpus, config: TokenizerConfig) -> Tokenizer:
    """Returns a bpe that is trained in a process of its own, which ctrl-C ends: the library does
    not listen. Raises ValueError where the system killed that process."""
    print(
        f"training tokenizer=bpe of {config.vocab_size:,} ids on up to {config.train_megabytes:g}"
        " MB of each source",
        file=sys.stderr,
    )
    began = time.monotonic()
    # The library trains in one call, which only the end of its process interrupts.
    with worker_processes(1, None) as pool:
        future = pool.submit(train_on_head, text, config)
        while True:
            try:
                return future.result(SIGN_OF_LIFE)
            except TimeoutError:
                # The training itself may have raised it.
                if future.done():
                    raise
                seconds = time.monotonic() - began
                print(f"training tokenizer=bpe: {seconds:.0f} s so far", file=sys.stderr)
            except BrokenProcessPool:
                raise ValueError(
                    f"tokenizer.train_megabytes={config.train_megabytes}: training the tokenizer"
                    " was killed, perhaps for want of memory; set less"
                ) from None


def train_on_head(text: AnyCorpus, config: TokenizerConfig) -> Tokenizer:
    """Returns a bpe trained on the first train_megabytes of each source."""
    # Each source has its share, so that a small one is not lost beside a large one.
    limit = int(config.train_megabytes * 1e6)
    heads = (part for name in text.sources for part in head(text.training_texts(name), limit))
    return train_bpe(heads, config.vocab_size)
