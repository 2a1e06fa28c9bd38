"""What is wrong with the data of a configuration, as far as that shows without preparing it."""

import itertools
from pathlib import Path

from conf.key import expand
from conf.text import DataConfig, TokenizerConfig
from data.cache_folders import recall_folder
from data.corpora import TextCorpus
from data.documents import documents
from data.pieces import extent, spans
from data.rows import BadRow, skip_or_refuse
from data.source_files import File, NoText
from data.sources import find_text
from data.tokens import check_tokens

# Files of each source of which the beginning is read, and documents of each of these files.
FILES_READ = 100
DOCUMENTS_READ = 100


def check_data(data: DataConfig, tokenizer: TokenizerConfig, length: int) -> None:
    """Checks a configuration without reading much, writing, or asking the network.

    Args:
        data: where the text is
        tokenizer: the tokenizer
        length: tokens of a sequence

    Raises:
        ValueError: a run would refuse the text, its files or the cache
    """
    # The cache is made at the start of a run; here the nearest folder above it must be one.
    cache = Path(expand("data.cache", data.cache)).absolute()
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    if not there.is_dir():
        raise ValueError(
            f"data.cache={data.cache} cannot be made ({there} is no folder); name a folder that can"
            " be written"
        )
    if data.source == "stdlib":
        return
    if data.source == "tokens":
        check_tokens(data, tokenizer, cache)
        return
    # Text that is gone is no mistake where its shards are in the cache.
    try:
        text = find_text(data)
    except NoText:
        if recall_folder(data, tokenizer, cache):
            return
        raise
    if isinstance(text, TextCorpus):
        for name, files in text.sources.items():
            check_rows(text, files)
            check_length(name, files, length)
        # A validation set may be shorter than a sequence, also where it has the name of a source.
        for files in text.named.values():
            check_rows(text, files)


def check_length(name: str, files: list[File], length: int) -> None:
    """Raises ValueError where the files of a training source cannot fill a sequence."""
    # A token is a byte at least, but for those that begin and end a document.
    most = sum(file.size for file in files) + 2 * len(files)
    if most <= length and not any(file.path.endswith(".parquet") for file in files):
        raise ValueError(
            f"batch.length={length} needs {length + 1} tokens but the source {name} has {most} at"
            " most; shorten it or give more text"
        )


def check_rows(text: TextCorpus, files: list[File]) -> None:
    """Raises ValueError where files hold no text, or the first FILES_READ of them begin with rows
    that cannot be read and are not to be skipped."""
    filled = [file for file in files if file.size]
    if not filled:
        raise ValueError(f"{files[0].path} has no text; give files with some")
    # The first piece of a file is enough: a wrong field or format shows in its first rows.
    for file in filled[:FILES_READ]:
        for span, _ in itertools.islice(spans(file, 0, extent(file), text.layout), 1):
            for _, found in itertools.islice(documents(span, text.layout), DOCUMENTS_READ):
                if isinstance(found, BadRow):
                    skip_or_refuse(found, text.data.bad_rows, None)
