"""python -m data.prepare [OVERRIDES]: text to token shards, in the cache where a run with the same
data finds them."""

import sys
import time
from dataclasses import dataclass

from data import Corpus, prepare


@dataclass
class Options:
    """Turns text into token shards, which runs with the same data find in the cache.

    It takes every override of a run.

    python -m data.prepare data=stdlib tokenizer=bpe
    python -m data.prepare data=c4 tokenizer=gpt2 data.documents=1000000
    """


def main(overrides: list[str]) -> None:
    """Prepares the corpus of a configuration and prints what it came to."""
    from conf.cli import offer_help, user_errors
    from conf.output import harmless_output
    from launch.config import compose

    with user_errors(), harmless_output():
        offer_help(Options, overrides, ("data", "tokenizer"))
        config = compose(overrides)
        start = time.perf_counter()
        try:
            corpus = prepare(config.data, config.tokenizer)
        except KeyboardInterrupt:
            print(
                "\ninterrupted: what is prepared is kept, and the same command goes on from there",
                file=sys.stderr,
            )
            sys.exit(130)
        print_corpus(corpus, time.perf_counter() - start)


def print_corpus(corpus: Corpus, seconds: float) -> None:
    """Prints what a corpus came to, and how fast."""
    parts = corpus.meta["parts"]
    for part, entry in parts.items():
        ratio = entry["bytes"] / entry["tokens"]
        print(
            f"{part}: {entry['tokens']:,} tokens, {entry['documents']:,} documents, {ratio:.3f}"
            f" bytes per token, {entry['shards']} shards"
        )
    megabytes = sum(entry["bytes"] for entry in parts.values()) / 1e6
    print(
        f"{megabytes:.1f} MB in {seconds:.1f} s ({megabytes / seconds:.1f} MB/s); vocabulary"
        f" {corpus.tokenizer.vocab_size}; {corpus.folder}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
