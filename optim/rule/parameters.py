"""Which parameters a rule moves, and what they are."""

import fnmatch
from collections.abc import Mapping

from torch import Tensor, nn

LEFT_OUT = {"all": "", "no_embeddings": "embedding", "no_norms": "norm"}


def choose(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], pattern: str
) -> dict[str, nn.Parameter]:
    """Returns the parameters to be moved: all, no_embeddings, no_norms, head (the tied embedding,
    where it is the head), or those whose name matches a pattern. Raises ValueError where there are
    none."""
    kind_of = kinds(module, parameters)
    # A tied head is an embedding by its kind, and is found by identity.
    tied = getattr(module, "unembedding", None)

    def is_chosen(name: str, parameter: nn.Parameter) -> bool:
        if pattern == "head":
            return kind_of[name] == "head" or parameter is tied
        if pattern in LEFT_OUT:
            return kind_of[name] != LEFT_OUT[pattern]
        return fnmatch.fnmatch(name, pattern)

    chosen = {name: p for name, p in parameters.items() if is_chosen(name, p)}
    if not chosen:
        raise ValueError(
            f"parameters={pattern} matches no parameter; the first is {next(iter(parameters))}"
        )
    return chosen


def kinds(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Returns what each parameter is: embedding (a tied head among them), head, norm or body."""
    # A parameter is what the layer is that holds it: names differ from model to model.
    owners = {id(p): owner for owner in module.modules() for p in owner.parameters(recurse=False)}
    output = output_of(module)
    bias = getattr(owners.get(id(output)), "bias", None)

    def kind(parameter: Tensor) -> str:
        owner = owners[id(parameter)]
        if isinstance(owner, nn.Embedding):
            return "embedding"
        if parameter is output or parameter is bias:
            return "head"
        if is_norm(owner):
            return "norm"
        return "body"

    return {name: kind(p) for name, p in parameters.items()}


def output_of(module: nn.Module) -> Tensor | None:
    """Returns the weight of the head: the unembedding, or that of the last linear layer."""
    output = getattr(module, "unembedding", None)
    linear = [owner for owner in module.modules() if isinstance(owner, nn.Linear)]
    if output is None and linear:
        output = own_weight(linear[-1])
    return output


def own_weight(owner: nn.Module) -> Tensor | None:
    """Returns the weight that a layer holds. `owner.weight` would compute that of a layer which is
    parametrised, as by spectral_norm, and its buffers with it."""
    return dict(owner.named_parameters(recurse=False)).get("weight")


def is_norm(owner: nn.Module) -> bool:
    """Returns whether a layer normalises."""
    return "Norm" in type(owner).__name__


def multiplied(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> set[str]:
    """Returns the names of the parameters that matrix products take, and that autocast therefore
    rounds: matrices, and the biases beside them. Look-ups of embeddings and positions, norms, and
    scales of their own are not among them; an embedding that is the head as well is."""

    def multiplies(owner: nn.Module, parameter: Tensor) -> bool:
        if isinstance(owner, nn.Embedding) or is_norm(owner):
            return False
        if isinstance(owner, nn.Linear) or parameter.ndim >= 2:
            return True
        # A bias is rounded where the weight beside it is multiplied.
        weight = own_weight(owner)
        return weight is not None and weight.ndim >= 2

    found = {id(getattr(module, "unembedding", None))}
    for owner in module.modules():
        found |= {id(p) for p in owner.parameters(recurse=False) if multiplies(owner, p)}
    return {name for name, p in parameters.items() if id(p) in found}
