"""Our tokenizers as the files of a Hugging Face folder."""

import json
from typing import TYPE_CHECKING, Any

from data.hf_folder import SETTINGS
from data.hf_tokenizer import HFTokenizer
from data.tokenizer import (
    BYTES_PATTERN,
    END_OF_TEXT,
    FILE,
    GPT2_PATTERN,
    RankedTokenizer,
    Tokenizer,
    byte_alphabet,
)

if TYPE_CHECKING:
    import tokenizers


def to_files(tokenizer: Tokenizer, max_length: int) -> dict[str, dict[str, Any]]:
    """Returns the files of a folder from which AutoTokenizer loads a tokenizer, by their names;
    those that it was read from, where it is Hugging Face's. Raises ValueError for ranks with a
    split pattern other than GPT-2's."""
    if isinstance(tokenizer, HFTokenizer):
        # What the folder said itself goes before what is filled in.
        own = json.loads(tokenizer.settings)
        defaults = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": tokenizer.encoding.id_to_token(tokenizer.eot),
        }
        return {
            FILE: json.loads(tokenizer.huggingface),
            SETTINGS: defaults | {"model_max_length": max_length} | own,
        }
    assert isinstance(tokenizer, RankedTokenizer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        # The name of a special token in a text is only text, as in training.
        "split_special_tokens": True,
    }
    return {FILE: json.loads(to_tokenizers(tokenizer).to_str()), SETTINGS: settings}


def to_tokenizers(tokenizer: RankedTokenizer) -> "tokenizers.Tokenizer":
    """Returns ranks as Hugging Face's own kind.

    End of text is a special token; a program that loads it must ask for `encode_special_tokens`,
    lest "<|endoftext|>" in a text become that. Raises ValueError for a split pattern other than
    GPT-2's."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    if tokenizer.pattern not in (BYTES_PATTERN, GPT2_PATTERN):
        raise ValueError(
            f"tokenizer.name={tokenizer.name} splits text as GPT-2 does not, which cannot be"
            " exported; train with tokenizer=bpe"
        )
    spelling = {value: character for character, value in byte_alphabet().items()}
    vocab = {
        "".join(spelling[value] for value in token): rank
        for rank, token in enumerate(tokenizer.ranks)
    }
    # tiktoken merges any two neighbours that make a token, lowest rank first: here every way to
    # part a token is a merge.
    merges = [
        (token[:i], token[i:])
        for token in vocab
        for i in range(1, len(token))
        if token[:i] in vocab and token[i:] in vocab
    ]
    # ignore_merges: a word that is a token is not taken apart, as in tiktoken.
    made = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=tokenizer.pattern == GPT2_PATTERN
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, special=True, normalized=False)])
    assert made.token_to_id(END_OF_TEXT) == tokenizer.eot
    return made
