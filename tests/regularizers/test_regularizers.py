"""Proximal term, EWC and distillation against float64 sums written out, and PaFL's vectors."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from tests.losses.steps import batch, head, inner_step, results, with_head
from titan_ext.errors import UserError
from titan_ext.losses import TokenLoss
from titan_ext.losses.vocabulary import softened_divergence
from titan_ext.regularizers import REGULARIZERS, Phase, Received, Regularizer, RegularizerConfig


def received(model: nn.Module, values: dict[str, torch.Tensor], gradients: list[list[torch.Tensor]] = ()) -> Received:
    def of_batches(batches: int) -> Iterator[list[torch.Tensor]]:
        yield from gradients[:batches]

    return Received([model], lambda: values, of_batches)


class Vector(nn.Module):
    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(values))
        self.own = nn.Parameter(torch.ones(2))


def built(name: str, **settings: float) -> Regularizer:
    return Phase(name=name, **settings).build()


def test_ewcs_toy_has_the_gradient_of_a_penalty_of_500() -> None:
    """theta (1, 2), received (0, 2.5), F (.1, .4), lambda 5000: 5000 / 2 (.1 + .4 * .25) = 500."""
    model = Vector([1.0, 2.0])
    model.theta.grad, model.own.grad = torch.tensor([1.0, 1.0]), torch.ones(2)
    gradients = [[torch.tensor([math.sqrt(0.1), math.sqrt(0.4)])]] * 3
    view = received(model, {"theta": torch.tensor([0.0, 2.5])}, gradients)
    ewc = built("ewc", fisher_batches=3)
    ewc.begin_round(view)
    ewc.add_gradients(view)
    theta, anchor, fisher = [1.0, 2.0], [0.0, 2.5], [0.1, 0.4]
    assert sum(5000 / 2 * f * (t - a) ** 2 for t, a, f in zip(theta, anchor, fisher)) == pytest.approx(500)
    wanted = [1 + 5000 * f * (t - a) for t, a, f in zip(theta, anchor, fisher)]
    assert model.theta.grad.tolist() == pytest.approx(wanted, rel=1e-5)
    assert model.own.grad.tolist() == [1.0, 1.0], "what no round brings is left alone"


def test_the_diagonal_is_the_mean_of_squared_gradients_at_the_received_model() -> None:
    model, seen = Vector([1.0, 2.0]), []

    def of_batches(batches: int) -> Iterator[list[torch.Tensor]]:
        for each in range(batches):
            seen.append(model.theta.detach().clone())
            yield [torch.tensor([float(each), 1.0])]

    view = Received([model], lambda: {"theta": torch.tensor([7.0, 8.0])}, of_batches)
    ewc = built("ewc", strength=2.0, fisher_batches=3)
    ewc.begin_round(view)
    assert [each.tolist() for each in seen] == [[7.0, 8.0]] * 3 and model.theta.tolist() == [1.0, 2.0]
    model.theta.grad = torch.zeros(2)
    ewc.add_gradients(view)
    assert model.theta.grad.tolist() == pytest.approx([2 * (0 + 1 + 4) / 3 * -6, 2 * 1.0 * -6])


def test_the_proximal_term_is_ewc_with_importance_1() -> None:
    model = Vector([1.0, -2.0])
    model.theta.grad = torch.tensor([0.5, 0.25])
    view = received(model, {"theta": torch.tensor([3.0, -2.0])})
    built("proximal", strength=0.1).add_gradients(view)
    assert model.theta.grad.tolist() == pytest.approx([0.5 + 0.1 * -2, 0.25])


@pytest.mark.parametrize("name", ["proximal", "ewc"])
def test_at_the_received_model_the_gradient_is_the_losss_alone(name: str) -> None:
    model = Vector([1.0, -2.0])
    model.theta.grad = torch.tensor([0.5, 0.25])
    view = received(model, {"theta": model.theta.detach().clone()}, [[torch.ones(2)]] * 8)
    regularizer = built(name)
    regularizer.begin_round(view)
    regularizer.add_gradients(view)
    assert model.theta.grad.tolist() == [0.5, 0.25]


def divergence_reference(teacher: list[float], own: list[float], temperature: float) -> float:
    def softened(logits: list[float]) -> list[float]:
        powers = [math.exp(each / temperature) for each in logits]
        return [each / sum(powers) for each in powers]

    pairs = zip(softened(teacher), softened(own))
    return temperature**2 * sum(wanted * math.log(wanted / found) for wanted, found in pairs)


def test_pafls_vector_of_distillation() -> None:
    """Logits (1, 0, -1) of the student, (0, 1, 0) of the teacher, label 0, alpha .95, T 6: .4455 with a sum over classes."""
    student, teacher = [1.0, 0.0, -1.0], [0.0, 1.0, 0.0]
    divergence = softened_divergence(torch.tensor([teacher]), torch.tensor([student]), None, 6.0)
    assert divergence.item() == pytest.approx(divergence_reference(teacher, student, 6.0), rel=1e-5)
    cross_entropy = math.log(sum(map(math.exp, student))) - student[0]
    found = 0.95 * divergence.item() + 0.05 * cross_entropy
    assert round(found, 4) == 0.4455


@pytest.mark.parametrize("chunks", [1, 4])
def test_distillation_mixes_each_tokens_divergence_into_its_loss(chunks: int) -> None:
    tokens, lm_head, states = batch(), head(), torch.randn(2, 32, 16)
    loss = with_head(TokenLoss.Config(num_chunks=chunks).build(compile_config=None), lm_head)
    loss.attach(inner_step(loss))
    loss.loss_fn.teaching = (0.3, 2.0)
    teacher = torch.randn(2, 32, 16)
    loss.learn_from(teacher)
    value, *gradients = results(loss, lm_head, states, tokens.pack())
    leaf, weight = states.double().requires_grad_(), lm_head.weight.detach().double().requires_grad_()
    logits, wanted = leaf @ weight.T, teacher.double() @ lm_head.weight.detach().double().T
    total = torch.zeros((), dtype=torch.float64)
    for row, label, other in zip(logits.flatten(0, 1), tokens.labels.flatten().tolist(), wanted.flatten(0, 1)):
        if label == -100:
            continue
        p, q = (other / 2).softmax(-1), (row / 2).softmax(-1)
        total = total + 0.7 * (row.logsumexp(-1) - row[label]) + 0.3 * 4 * (p * (p.log() - q.log())).sum()
    (total / 57).backward()
    torch.testing.assert_close(value.double(), total.detach() / 57, rtol=1e-5, atol=1e-6)
    for found, each in zip(gradients, (weight.grad, leaf.grad), strict=True):
        torch.testing.assert_close(found.double(), each, rtol=1e-4, atol=1e-6)


def test_a_student_like_its_teacher_has_no_divergence_and_no_gradient_of_it() -> None:
    logits = torch.randn(5, 7).requires_grad_()
    divergence = softened_divergence(logits.detach(), logits, None, 6.0)
    divergence.sum().backward()
    assert divergence.abs().max() < 1e-4 and logits.grad.abs().max() < 1e-6


def test_a_share_of_0_gives_the_plain_losss_bits() -> None:
    tokens, lm_head, states = batch(), head(), torch.randn(2, 32, 16)
    loss = with_head(TokenLoss.Config(num_chunks=4).build(compile_config=None), lm_head)
    loss.attach(inner_step(loss))
    plain = results(loss, lm_head, states, tokens.pack())
    loss.loss_fn.teaching = (0.0, 6.0)
    loss.learn_from(torch.randn(2, 32, 16))
    assert all(map(torch.equal, results(loss, lm_head, states, tokens.pack()), plain))


def test_phases_have_their_rounds() -> None:
    phase = Phase(name="proximal", from_round=2, until_round=9, every=3)
    assert [number for number in range(12) if phase.has(number)] == [2, 5, 8]
    assert all(Phase(name="proximal").has(number) for number in (0, 1, 100))
    assert RegularizerConfig(phases=[Phase(name="ewc")]).runs_passes and not RegularizerConfig().teaches


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "fedprox"}, "must be one of distillation, ewc, proximal"),
        ({"name": "proximal", "strength": -1.0}, "strength"),
        ({"name": "distillation", "strength": 1.5}, "strength.*from 0 to 1"),
        ({"name": "distillation", "temperature": 0.0}, "temperature"),
        ({"name": "ewc", "fisher_batches": 0}, "fisher_batches"),
        ({"name": "proximal", "temperature": 2.0}, "temperature.*left out"),
        ({"name": "ewc", "until_round": 0}, "until_round"),
        ({"name": "ewc", "every": 0}, "every"),
    ],
)
def test_settings_that_cannot_be_are_named(settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Phase(**settings)


def test_a_regularizer_of_ones_own_is_one_class() -> None:
    from titan_ext.regularizers import register_regularizer

    with REGULARIZERS.isolated():

        @register_regularizer("nothing")
        class Nothing(Regularizer):
            pass

        assert type(Phase(name="nothing").build()) is Nothing
