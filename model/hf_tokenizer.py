"""Our tokenizers as Hugging Face's tokenizer.json, and back. The ids of any text are the same on both sides."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from data.tokenizer import BYTES_PATTERN, END_OF_TEXT, GPT2_PATTERN, Tokenizer, byte_alphabet

if TYPE_CHECKING:
    import tokenizers


def to_tokenizers(tokenizer: Tokenizer) -> "tokenizers.Tokenizer":
    """The tokenizer as Hugging Face's own kind. End of text is a special token; whoever loads it must ask for
    `encode_special_tokens`, lest "<|endoftext|>" in a text become that. Raises ValueError for a split pattern other than GPT-2's."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    if tokenizer.pattern not in (BYTES_PATTERN, GPT2_PATTERN):
        raise ValueError(f"tokenizer.name={tokenizer.name} splits text as GPT-2 does not, which cannot be exported; train with tokenizer=bpe")
    spelling = {value: character for character, value in byte_alphabet().items()}
    vocab = {"".join(spelling[value] for value in token): rank for rank, token in enumerate(tokenizer.ranks)}
    # tiktoken merges any two neighbours that make a token, lowest rank first: here every way to part a token is a merge.
    merges = [(token[:i], token[i:]) for token in vocab for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab]
    made = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))  # a word that is a token is not taken apart, as in tiktoken
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=tokenizer.pattern == GPT2_PATTERN)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, special=True, normalized=False)])
    assert made.token_to_id(END_OF_TEXT) == tokenizer.eot
    return made


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder. Raises ValueError where there is none, and for any that is not a byte-level BPE as GPT-2's:
    its ids in the order of its merges, and end of text the only special token and the last id."""
    path = folder / "tokenizer.json"
    try:
        content = json.loads(path.read_text())
        model, splitter, added = content["model"], content["pre_tokenizer"] or {}, content["added_tokens"]
        vocab = {token: rank for token, rank in model["vocab"].items() if token != END_OF_TEXT}
        merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
        eot = [token["id"] for token in added]
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; AutoTokenizer.from_pretrained(...).save_pretrained({str(folder)!r}) writes it") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is not a byte-level BPE; choose a model with GPT-2's kind of tokenizer") from None
    by_id, bytes_of = sorted(vocab, key=vocab.__getitem__), byte_alphabet()
    results = [vocab.get("".join(pair), -1) for pair in merges]
    reasons = {
        f"its kind is {model.get('type')}": model.get("type", "BPE") != "BPE" or model.get("byte_fallback"),
        "it normalises text": content.get("normalizer"),
        f"it splits text by {splitter.get('type')}": splitter.get("type") != "ByteLevel" or not (splitter.get("use_regex", True) or not merges),
        "it adds a space before a text": splitter.get("add_prefix_space"),
        f"its special tokens are {', '.join(token['content'] for token in added)}": eot != [len(vocab)],
        "its ids have gaps or are not bytes": [vocab[t] for t in by_id] != [*range(len(vocab))] or not set("".join(by_id)) <= set(bytes_of),
        "its ids are not in the order of its merges": results != sorted(results) or -1 in results,
    }
    if reason := next((reason for reason, wrong in reasons.items() if wrong), None):
        raise ValueError(f"{path} is not a tokenizer of GPT-2's kind, with {END_OF_TEXT} last: {reason}; choose a model that has one")
    ranks = tuple(bytes(bytes_of[character] for character in token) for token in by_id)
    if splitter.get("use_regex", True):
        return Tokenizer("bpe", GPT2_PATTERN, ranks)
    return Tokenizer("bytes", BYTES_PATTERN, ranks)
