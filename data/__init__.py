"""From text to batches: corpora, tokenizers, token shards and the loader. Nothing here knows of
models or optimisers."""

from data.baselines import training_sample, unigram_bigram
from data.loader import Loader, Prefetcher, Validation
from data.prepared import prepare
from data.shards import Corpus, Tokens
from data.tokenizer import Tokenizer

__all__ = [
    "Corpus",
    "Loader",
    "Prefetcher",
    "Tokenizer",
    "Tokens",
    "Validation",
    "prepare",
    "training_sample",
    "unigram_bigram",
]
