"""The transformer, its lazy logits, and what is done with a trained one."""

from model.checkpoint import checkpoint_path
from model.gpt import GPT, GPTConfig, KeyValueCache, load

__all__ = ["GPT", "GPTConfig", "KeyValueCache", "checkpoint_path", "load"]
