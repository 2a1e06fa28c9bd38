"""What people with a loop of their own hand to a rule: it works, or one line says what to write."""

import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from optim import Adapter, Gradient, SharpnessAware
from tests.problems import V, adamw, gpt, mlp, taken, token_batches, vector_batches, whole

transformers = pytest.importorskip("transformers")


def causal_lm() -> nn.Module:
    shape = {
        "vocab_size": V,
        "n_positions": 8,
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 8,
        "resid_pdrop": 0,
        "embd_pdrop": 0,
        "attn_pdrop": 0,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).double()


def gradient(model, batches) -> torch.Tensor:
    Gradient(model).gradient(batches)
    return taken(model)


def test_a_pair_outside_a_list_is_the_batch():
    pair = whole(token_batches())
    pair[1][:, -1] = -100  # for which the labels of transformers have no place
    expected = gradient(gpt(), [pair])
    for given in (
        pair,
        [*pair],
        [[*pair]],
        iter([pair]),
        {"input_ids": pair[0], "labels": shift_back(*pair)},
    ):
        assert torch.equal(gradient(gpt(), given), expected)
    # What a DataLoader gives is a list of two tensors.
    assert torch.equal(
        gradient(gpt(), list(DataLoader(TensorDataset(*pair), batch_size=len(pair[0])))), expected
    )


def shift_back(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The labels of transformers for some targets."""
    return torch.cat([torch.full_like(tokens[:, :1], -100), targets[:, :-1]], 1)


@pytest.mark.parametrize("path", ["full", "functional", "logit"])
def test_a_model_of_transformers_and_its_batches_need_no_adapter(path):
    tokens = torch.randint(0, V, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, 4:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    batch = transformers.BatchEncoding(
        {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    )
    model, twin = causal_lm(), causal_lm()
    theirs = twin(**batch).loss
    theirs.backward()
    result = Gradient(model).gradient(batch)
    assert result.loss.item() == pytest.approx(theirs.item(), rel=1e-6) and result.tokens == int(
        (labels[:, 1:] != -100).sum()
    )
    # their loss is taken in fp32
    torch.testing.assert_close(taken(model), taken(twin), rtol=1e-4, atol=1e-7)
    with_adapter = Adapter(twin, logits=lambda m, inputs: m(**inputs).logits)
    targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    SharpnessAware(with_adapter, adamw(twin), path=path, rho=0.3).gradient(
        [({"input_ids": tokens, "attention_mask": mask}, targets)]
    )
    SharpnessAware(model, adamw(model), path=path, rho=0.3).gradient([batch])
    assert torch.equal(taken(model), taken(twin))


def test_labels_of_a_classifier_stay_where_they_are():
    shape = {
        "vocab_size": V,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "num_labels": 3,
    }
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**shape)).eval()
    batch = {"input_ids": torch.randint(0, V, (4, 5)), "labels": torch.tensor([0, 2, 1, 1])}
    assert Gradient(model).gradient(batch).loss.item() == pytest.approx(
        model(**batch).loss.item(), rel=1e-5
    )


class Within(nn.Module):
    """A language model in a module of one's own, which does not say what it is."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = causal_lm()

    def forward(self, input_ids):
        return self.inner(input_ids).logits


def test_a_language_model_in_the_wrapper_of_devices_shifts_its_labels():
    tokens = torch.randint(0, V, (3, 7), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "labels": tokens}
    assert torch.equal(gradient(nn.DataParallel(causal_lm()), batch), gradient(causal_lm(), batch))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_targets_may_be_of_any_whole_numbers(dtype):
    (inputs, targets), *_ = vector_batches()
    assert torch.equal(
        gradient(mlp(), (inputs, targets.to(dtype))), gradient(mlp(), (inputs, targets))
    )


class Two(nn.Module):
    """A module that gives more than logits."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x):
        return self.inner(x), x


class Scalar(Two):
    """A module that gives its loss."""

    def forward(self, x):
        return self.inner(x).sum()


def test_what_makes_no_rule_is_refused_in_a_line():
    with pytest.raises(
        ValueError, match="optimizer=None is no optimiser of torch; give the one that steps"
    ):
        SharpnessAware(mlp(), None)
    model = mlp().requires_grad_(False)
    with pytest.raises(ValueError, match=r"no weight of .* is trained; set requires_grad of some"):
        Gradient(model)


@pytest.mark.parametrize(
    ("make", "given", "said"),
    [
        (gpt, lambda: None, "batches=None is no list; give one of pairs (inputs, targets)"),
        (Scalar, lambda: vector_batches(), "Scalar gives a Tensor, and a rule needs logits"),
        (
            gpt,
            lambda: [torch.zeros(2, 5, dtype=torch.int64)],
            "a Tensor is no micro-batch; give pairs (inputs, targets), or dicts with labels",
        ),
        (gpt, lambda: [(1, 2, 3)], "a tuple is no micro-batch"),
        (gpt, lambda: [[3]], "a int is no micro-batch"),
        (
            gpt,
            lambda: {"input_ids": torch.zeros(2, 5, dtype=torch.int64)},
            "a dict of input_ids has no labels; add them",
        ),
        (
            gpt,
            lambda: {"input_ids": 0, "attention_mask": 0, "labels": torch.zeros(2, 5)},
            "a GPT reads tokens, and no attention_mask",
        ),
        (
            gpt,
            lambda: (torch.arange(10).view(2, 5), torch.arange(8).view(2, 4)),
            "targets (2, 4) of torch.int64 do not fit tokens (2, 5)",
        ),
        (
            gpt,
            lambda: (torch.arange(10).view(2, 5), torch.arange(10).view(2, 5)),
            "targets are the inputs themselves, which a language model would",
        ),
        (
            causal_lm,
            lambda: ({"input_ids": torch.arange(10).view(2, 5)}, torch.arange(10).view(2, 5)),
            "targets are the inputs themselves",
        ),
        (
            Within,
            lambda: {
                "input_ids": torch.arange(10).view(2, 5),
                "labels": torch.arange(10).view(2, 5),
            },
            "targets are the inputs themselves",
        ),
        (
            mlp,
            lambda: (torch.zeros(3, 7).double(), torch.zeros(3) > 0),
            "targets (3,) of torch.bool do not fit logits (3, 23)",
        ),
        (
            mlp,
            lambda: (torch.zeros(3, 7).double(), torch.zeros(3)),
            "targets (3,) of torch.float32 do not fit logits (3, 23)",
        ),
        (
            mlp,
            lambda: (torch.zeros(3, 7).double(), torch.zeros(3, 2, dtype=torch.int64)),
            "targets (3, 2) of torch.int64 do not fit logits (3, 23)",
        ),
        (
            mlp,
            lambda: (torch.zeros(3, 7).double(), torch.tensor(3)),
            "targets have no dimension of instances",
        ),
        (
            Two,
            lambda: vector_batches(),
            (
                "Two gives a tuple, and a rule needs logits; say how to get them:"
                " optim.Adapter(model, logits="
            ),
        ),
    ],
)
def test_what_is_no_batch_is_refused_in_a_line(make, given, said):
    model = make()
    for rule in (Gradient(model), SharpnessAware(model, adamw(model))):
        with pytest.raises(ValueError, match=re.escape(said)) as error:
            rule.gradient(given())
        assert "\n" not in str(error.value)


def test_tokens_that_repeat_are_no_mistake():
    tokens = torch.full((2, 5), 3)
    Gradient(gpt()).gradient((tokens, tokens))


@pytest.mark.parametrize("axes", [{}, {"direction": "momentum"}, {"path": "functional"}])
def test_sparse_gradients_are_refused_by_name(axes):
    model = nn.Sequential(nn.Embedding(20, 8, sparse=True), nn.Linear(8, V))
    before = [p.clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for p in model.parameters():
        optimizer.state[p]["momentum_buffer"] = torch.ones_like(p)
    with pytest.raises(
        ValueError,
        match=r"0\.weight has a sparse gradient, .* make its embedding with sparse=False",
    ):
        SharpnessAware(model, optimizer, rho=0.1, **axes).gradient(
            (torch.arange(6), torch.arange(6))
        )
    assert all(
        torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True)
    )


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("parameters", ["all", "no_embeddings", "no_norms"])
def test_making_a_rule_runs_no_power_iteration(layer, parameters):
    layers = [nn.Linear(8, 8), nn.Linear(8, V)]
    layers[layer] = nn.utils.parametrizations.spectral_norm(layers[layer])
    model = nn.Sequential(*layers)
    before = [buffer.clone() for buffer in model.buffers()]
    assert before
    SharpnessAware(model, torch.optim.SGD(model.parameters(), 0.1), parameters=parameters)
    assert all(torch.equal(one, other) for one, other in zip(before, model.buffers(), strict=True))
