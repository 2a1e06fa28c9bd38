"""Hugging Face tokenizers as models have them, trained here on the standard library and saved by
transformers as whole folders."""

import json
import sysconfig
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

# How Llama 3 splits text, as its tokenizer.json has it.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

SAMPLES = [
    "a",
    "Grüße, 日本語 🙂\u3000\r\n\t x  \n\n y",
    "<|endoftext|>",
    "a <|endoftext|> b.",
    "'s 're 123  4\n   ",
    "\x00\x7f\u2028\ufeff",
]
SPECIAL = ["<|eot_id|>", "<s> a</s><|end_of_text|>", "a<|begin_of_text|>b</s>c <unk> d", "<0x41>x"]


def stdlib_texts() -> list[str]:
    return [
        path.read_text(encoding="utf-8")
        for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    ]


def save(made: tokenizers.Tokenizer, folder: Path, **settings: Any) -> Path:
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **settings).save_pretrained(folder)
    return folder


def begins_with(made: tokenizers.Tokenizer, token: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{token} $A",
        pair=f"{token} $A {token}:1 $B:1",
        special_tokens=[(token, made.token_to_id(token))],
    )


def llama3(folder: Path, vocab_size: int = 1000) -> Path:
    """Llama 3: byte-level BPE, its own split pattern, and 256 special tokens above the others."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        stdlib_texts()[:40],
        trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False),
    )
    made.model.ignore_merges = True
    made.decoder = decoders.ByteLevel()
    special = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        *(f"<|reserved_special_token_{i}|>" for i in range(2)),
        "<|eot_id|>",
    ]
    special += [f"<|reserved_special_token_{i}|>" for i in range(2, 253)]
    made.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    made.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), begins_with(made, "<|begin_of_text|>")]
    )
    return save(
        made,
        folder,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        clean_up_tokenization_spaces=True,
    )


def sentencepiece(vocab_size: int = 1000) -> tokenizers.Tokenizer:
    """The vocabulary of Llama 2 in small: pieces whose space is "▁", 256 bytes for everything else,
    and no pre-tokenizer."""
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    # for training only: no merge spans words
    made.pre_tokenizer = pre_tokenizers.Split(Regex("▁+[^▁\n]*|[^▁]+"), "isolated")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, limit_alphabet=90, show_progress=False
    )
    made.train_from_iterator((text.replace("\n", " ") for text in stdlib_texts()[:40]), trainer)
    content = json.loads(made.to_str())
    # the bytes are pieces, as sentencepiece has them
    content |= {
        "pre_tokenizer": None,
        "added_tokens": content["added_tokens"][:3],
    }
    made = tokenizers.Tokenizer.from_str(json.dumps(content))
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.post_processor = begins_with(made, "<s>")
    return made


def llama2(folder: Path) -> Path:
    """Llama 2, TinyLlama, Mistral 7B: the space in front is put there by the normaliser."""
    return save(
        sentencepiece(),
        folder,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def metaspace(folder: Path) -> Path:
    """The same as transformers 5 writes it: the space in front is put there by the
    pre-tokenizer."""
    made = sentencepiece()
    made.normalizer = None
    made.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="first", split=False
    )
    return save(made, folder, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def neox(folder: Path) -> Path:
    """GPT-NeoX, Pythia, OLMo: byte-level BPE with GPT-2's pattern, NFC, runs of spaces as tokens
    that are not special, and nothing in front."""
    made = tokenizers.Tokenizer(models.BPE())
    made.normalizer, made.decoder = normalizers.NFC(), decoders.ByteLevel()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|endoftext|>", "<|padding|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(stdlib_texts()[:40], trainer)
    made.add_tokens(
        [AddedToken(" " * length, normalized=True, special=False) for length in range(8, 1, -1)]
    )
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    return save(made, folder, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


FOLDERS = {"llama3": llama3, "llama2": llama2, "metaspace": metaspace, "neox": neox}


def edit(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file."""
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))
