"""Adaptation, against its recipe written out."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.models.abbie_models import VOCABULARY, build
from titan_ext.dept.plasticity import adapt, learning_rate_factor

STEPS, LR = 30, 3e-3


def batches():
    """The same few sequences over and over."""
    tokens = torch.randint(0, VOCABULARY, (2, 13), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(12).expand(2, 12)
    while True:
        yield {"input": tokens[:, :-1], "positions": positions}, tokens[:, 1:]


def loss_of(model) -> torch.Tensor:
    inputs, labels = next(batches())
    logits = model(inputs["input"], inputs["positions"], model.get_attention_masks(inputs["positions"]))
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def test_it_is_adamw_under_a_cosine_with_clipped_gradients():
    found, expected = build("llama3"), build("llama3")
    curve = adapt(found, batches(), steps=STEPS, lr=LR, evaluate=lambda: loss_of(found).item(), every=10)
    optimizer = torch.optim.AdamW(expected.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    losses = [loss_of(expected).item()]
    for step in range(STEPS):
        warmup = 3
        progress = (step - warmup) / (STEPS - warmup)
        cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
        optimizer.param_groups[0]["lr"] = LR * ((step + 1) / (warmup + 1) if step < warmup else cosine)
        optimizer.zero_grad()
        loss_of(expected).backward()
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        optimizer.step()
        losses.append(loss_of(expected).item())
    assert [step for step, _ in curve] == [0, 10, 20, 30]
    assert [loss for _, loss in curve] == pytest.approx([losses[step] for step, _ in curve], rel=1e-4)
    assert curve[-1][1] < curve[0][1] - 1


def test_it_evaluates_in_evaluation_mode_and_last_of_all():
    model, modes = build("llama3"), []
    curve = adapt(model, batches(), steps=5, lr=LR, evaluate=lambda: modes.append(model.training) or 0.0, every=3)
    assert [step for step, _ in curve] == [0, 3, 5] and modes == [False] * 3 and model.training


def test_the_learning_rate_rises_for_at_most_100_steps_and_falls_to_a_tenth():
    rates = [learning_rate_factor(step, 2000) for step in range(2000)]
    assert rates.index(max(rates)) == 100 and max(rates) == 1
    assert rates[:101] == sorted(rates[:101]) and rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3) and learning_rate_factor(1050, 2000) == pytest.approx(0.55)
    assert learning_rate_factor(0, 1) == 1
