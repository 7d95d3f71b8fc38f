"""The chunked loss equals the loss from full logits and calls the head once, so it works with sharded weights."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from hf_speechllm.model import loss as module
from hf_speechllm.model.chat import IGNORE_INDEX
from hf_speechllm.model.loss import UNSCALED, LogitScaling, supervised_loss

pytestmark = pytest.mark.core

VOCABULARY, WIDTH = 101, 32


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr(module, "POSITIONS_PER_CHUNK", 17)


@pytest.fixture
def inputs():
    """States and labels of 3 rows with 40 tokens each; the first 9 tokens are not supervised."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 40, WIDTH, generator=generator, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (3, 40), generator=generator)
    labels[:, :9] = IGNORE_INDEX
    return states, labels


@pytest.fixture
def head():
    torch.manual_seed(1)
    return nn.Linear(WIDTH, VOCABULARY, bias=False)


def full_loss(states, labels, head, scale=1.0, cap=None):
    logits = scale * head(states[:, :-1]).float()
    if cap is not None:
        logits = cap * (logits / cap).tanh()
    return functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("scaling", [UNSCALED, LogitScaling(0.25), LogitScaling(2.0, 1.5), LogitScaling(cap=0.7)])
def test_loss_and_gradients_equal_those_of_full_logits(inputs, head, autocast, trained, scaling):
    states, labels = inputs
    head.requires_grad_(trained)
    results = []
    for compute in (
        lambda *args: full_loss(*args, *scaling),
        lambda *args: supervised_loss(*args, scaling=scaling)[0],
    ):
        states.grad = head.weight.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = compute(states, labels, head)
        (2.5 * loss).backward()
        results.append((loss.detach(), states.grad, head.weight.grad))
    (expected, *gradients), (loss, *ours) = results
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert trained == (ours[1] is not None)
    for gradient, reference in zip(ours, gradients, strict=True):
        if reference is not None:
            error = (gradient - reference).norm() / reference.norm()
            assert error < (1e-2 if autocast else 1e-6)  # bfloat16 has three digits


@pytest.mark.parametrize("bias", [False, True])
def test_only_the_loss_is_divided_by_the_tokens_of_the_whole_step(inputs, bias):
    torch.manual_seed(1)
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias)
    states, labels = inputs
    predicted = head(states[:, :-1]).argmax(-1)
    labels[:, 10:20] = predicted[:, 9:19].detach()  # 30 of 93 are right, or a few more by chance
    loss, count, accuracy = supervised_loss(states, labels, head)
    in_step, *same = supervised_loss(states, labels, head, num_items_in_batch=2 * int(count))
    assert int(count) == 3 * 31
    assert accuracy.item() == pytest.approx((predicted == labels[:, 1:]).sum().item() / 93) and accuracy > 0.3
    assert same == [count, accuracy]
    assert in_step.item() == pytest.approx(loss.item() / 2)


def test_head_and_hooks_run_once_for_any_number_of_chunks(inputs, head):
    calls = []
    head.register_forward_pre_hook(lambda *_: calls.append("before"))
    head.register_forward_hook(lambda *_: calls.append("after"))
    supervised_loss(*inputs, head)[0].backward()
    assert calls == ["before", "after"]
    assert head(torch.zeros(1, WIDTH)).shape == (1, VOCABULARY)  # the original forward method is restored


def test_backward_does_not_need_the_weight(inputs, head):
    weight = head.weight.detach().clone()
    loss = supervised_loss(*inputs, head)[0]
    head.weight.data = torch.full_like(weight, torch.nan)  # FSDP frees the gathered weight after the forward pass
    loss.backward()
    assert torch.isfinite(inputs[0].grad).all()


def test_heads_with_bias_or_activation_use_full_logits(inputs):
    biased = nn.Linear(WIDTH, VOCABULARY)
    for layer in (biased, nn.Sequential(nn.Linear(WIDTH, VOCABULARY, bias=False), nn.Tanh())):
        loss = supervised_loss(*inputs, layer)[0]
        torch.testing.assert_close(loss, full_loss(*inputs, layer), rtol=1e-6, atol=0)


def test_nothing_supervised_gives_zero_and_no_gradient(inputs, head):
    states, labels = inputs
    loss, count, accuracy = supervised_loss(states, torch.full_like(labels, IGNORE_INDEX), head)
    loss.backward()
    assert (loss.item(), count.item(), accuracy.item()) == (0, 0, 0)
    assert not states.grad.any() and not head.weight.grad.any()
