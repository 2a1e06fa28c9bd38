"""The transformer, its lazy logits, and what is done with a trained one."""

from model.checkpoint import checkpoint_path, load
from model.config import GPTConfig
from model.gpt import GPT, KeyValueCache

__all__ = ["GPT", "GPTConfig", "KeyValueCache", "checkpoint_path", "load"]
