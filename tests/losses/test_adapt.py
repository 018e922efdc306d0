"""ADAPT against its equations, written out, and the numbers that follow from them by hand."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.losses.steps import WIDTH, batch, head, inner_step, plain_loss, results, with_head, write_texts
from titan_ext.losses import Tokens
from titan_ext.losses.adapt import Adapt
from titan_ext.losses.adapt.bm25 import Bm25
from titan_ext.losses.adapt.similarity import gate, pooled, samples, similarity


@pytest.fixture
def anchors(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "anchors.jsonl", ["one text", "another", "a third text that is longer"])


def adapt(anchors: Path, *, step: dict[str, Any] = {}, **settings: Any) -> Adapt:
    loss = with_head(Adapt.Config(anchors=str(anchors), num_chunks=4, **settings).build(compile_config=None), head())
    table = torch.randn(264, WIDTH, generator=torch.Generator().manual_seed(1))
    loss.attach(inner_step(loss, hidden=lambda inputs: table[inputs], **step))
    return loss


def known(centroid: list[float], anchors: Path, **settings: Any) -> Adapt:
    """With a centroid that is given."""
    loss = adapt(anchors, step={"width": len(centroid)}, **settings)
    loss._centroid.state["centroid"].copy_(torch.tensor(centroid))
    return loss


def of_positions(positions: list[list[int]]) -> Tokens:
    places = torch.tensor(positions)
    zeros = torch.zeros_like(places)
    return Tokens(zeros, zeros, places, zeros, zeros, places)


def test_vector_a(anchors: Path) -> None:
    states = torch.tensor([[[1.0, 0], [0, 1]], [[0, 2], [2, 0]]])
    sample, place = samples(torch.tensor([0, 1]), None)
    embeddings = torch.stack([pooled(each, sample, place + 1)[0] for each in states])
    expected = torch.tensor([[0.4472, 0.8944], [0.8944, 0.4472]])
    torch.testing.assert_close(embeddings, expected, atol=1e-4, rtol=0)
    score = similarity(embeddings, torch.tensor([1.0, 0]))
    weight = gate(score, 1.0)
    torch.testing.assert_close(weight, torch.tensor([0.6100, 0.7098]), atol=1e-4, rtol=0)
    losses = torch.tensor([2.0, 4.0])
    assert (weight * losses).sum().item() == pytest.approx(4.05916, abs=1e-5)
    tokens = of_positions([[0, 1], [0, 1]])
    # Each token's loss is its sample's: (w of the token) x l, summed and then rescaled.
    for aggregation, wanted in {"mean": 2.02958, "sum": 4.05916, "zsum": 3.07564, "tokens": 2.02958}.items():
        loss = known([1.0, 0], anchors, aggregation=aggregation)
        total = (loss.weights(states, tokens) * losses[:, None]).sum().item() / 4
        factor = loss.rescale(torch.tensor(4))
        assert total * (1.0 if factor is None else factor) == pytest.approx(wanted, abs=1e-5), aggregation


def test_vector_b(anchors: Path) -> None:
    states = torch.tensor([[[1.0, 0], [0, 1], [0, 2], [2, 0], [1, 1]]])
    loss = known([1.0, 0], anchors)
    weights = loss.weights(states, of_positions([[0, 1, 0, 1, 2]]))
    torch.testing.assert_close(weights, torch.tensor([[0.6100, 0.6100, 0.6929, 0.6929, 0.6929]]), atol=1e-4, rtol=0)
    assert not weights.requires_grad
    assert (weights * torch.tensor([2.0, 4, 1, 3, 5])).sum().item() / 5 == pytest.approx(1.979200, abs=1e-6)


def test_bm25_vector() -> None:
    a, b, c, d = range(4)
    documents, queries = [[a, b, a], [b, c], [c, c, d, a]], [[a], [c, d]]
    bm25 = Bm25.of(documents, queries, vocabulary=4, k1=1.5, b=0.75)
    scores = torch.stack([bm25.score(torch.tensor(each)) for each in documents])
    torch.testing.assert_close(scores, torch.tensor([0.335717, 0.276473, 0.934025]), atol=1e-6, rtol=0)
    standard = (scores - scores.mean()) / scores.std(correction=0)
    torch.testing.assert_close(standard, torch.tensor([-0.6050, -0.8045, 1.4095]), atol=1e-4, rtol=0)
    torch.testing.assert_close(gate(standard, 1.0), torch.tensor([0.3532, 0.3091, 0.8037]), atol=1e-4, rtol=0)
    together = bm25.scores(
        torch.tensor([token for each in documents for token in each]), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    )
    torch.testing.assert_close(together[:3], scores)
    assert not together[3:].any()


def reference(states: torch.Tensor, tokens: Tokens, centroid: torch.Tensor, block: int | None) -> torch.Tensor:
    """One document (or block) at a time, in float64."""
    weights = torch.zeros(tokens.labels.shape, dtype=torch.float64)
    for row, hidden in enumerate(states.double()):
        length = len(hidden)
        if block:
            begins = list(range(0, length, block))
        else:
            begins = [place for place in range(length) if tokens.positions[row, place] == 0]
        for begin, end in zip(begins, [*begins[1:], length]):
            pooled = sum((n + 1) * hidden[begin + n] for n in range(end - begin))
            score = torch.dot(pooled / pooled.norm(), centroid.double())
            weights[row, begin:end] = 1 / (1 + math.exp(-score))
    return weights


@pytest.mark.parametrize("block", [None, 8, 32])
def test_weights_equal_a_loop_over_documents_or_blocks(anchors: Path, block: int | None) -> None:
    unit = {} if block is None else {"unit": "block", "block_length": block}
    loss = adapt(anchors, **unit)
    loss.before_step(1)
    states, tokens = torch.randn(3, 32, WIDTH), batch(3)
    centroid = loss.state_dict()["centroid"]
    found = loss.weights(states, tokens)
    torch.testing.assert_close(found.double(), reference(states, tokens, centroid, block), atol=1e-6, rtol=0)
    # The size of hidden states does not matter, nor what else is in the batch.
    torch.testing.assert_close(loss.weights(states * 7, tokens), found)
    torch.testing.assert_close(
        loss.weights(states[1:2], Tokens(*(getattr(tokens, n)[1:2] for n in Tokens.__slots__))), found[1:2]
    )


@pytest.mark.parametrize("readers", [1, 2, 3])
def test_anchors_dealt_to_ranks_have_the_same_centroid(anchors: Path, readers: int) -> None:
    expected = adapt(anchors)
    expected.before_step(1)
    parts = []
    for reader in range(readers):
        loss = adapt(anchors, step={"reader": reader, "readers": readers, "rows": 2, "seq_len": 32})
        loss.before_step(1)
        parts.append(loss._centroid.local)
    total = sum(parts)
    assert total[-1] == 3
    torch.testing.assert_close((total[:-1] / total[-1]).float(), expected.state_dict()["centroid"])


def test_anchors_are_read_when_they_are_due(anchors: Path) -> None:
    for settings, due in (
        ({"refresh_every": 3}, [1, 4, 6, 9]),
        ({"refresh_every": 3, "refresh_after_sync": False}, [1, 4, 7]),
        ({"score": "bm25"}, []),
    ):
        loss = adapt(anchors, step={"documents": ("one", "two texts")}, **settings)
        read = []
        loss._centroid.begin = lambda: read.append(step)
        for step in range(1, 10):
            loss.before_step(step)
            if step == 5:
                loss.after_sync()
        assert read == due, settings


def test_a_forced_weight_of_one_is_the_plain_loss(anchors: Path) -> None:
    tokens, states = batch(), torch.randn(2, 32, WIDTH)
    loss = adapt(anchors, min_weight=1.0, max_weight=1.0)
    loss.before_step(1)
    expected = results(plain_loss(4, loss.lm_head), loss.lm_head, states, tokens.labels)
    assert all(map(torch.equal, results(loss, loss.lm_head, states, tokens.pack()), expected))


def test_padding_counts_nowhere_and_short_samples_are_neutral(anchors: Path) -> None:
    states = torch.randn(1, 6, WIDTH)
    tokens = of_positions([[0, 1, 2, 0, 1, 0]])
    tokens.labels[0, 3:5] = -100
    loss = adapt(anchors, min_tokens=2, aggregation="mean")
    loss.before_step(1)
    weights = loss.weights(states, tokens)
    assert weights[0, 5] == 0.5
    loss.after_step()
    assert loss._statistics.total("samples") == 2 and loss._statistics.total("tokens") == 4
    assert loss.rescale(torch.tensor(4)) == 4 / 2


def test_a_step_that_comes_to_nothing_leaves_no_trace(anchors: Path) -> None:
    loss = adapt(anchors, aggregation="zsum", standardize=True)
    loss.before_step(1)
    loss.weights(torch.full((2, 32, WIDTH), torch.inf), batch())
    loss.forget()
    weights = loss.weights(torch.randn(2, 32, WIDTH), batch())
    assert torch.isfinite(weights).all() and math.isfinite(loss.rescale(torch.tensor(57)))
    loss.after_step()
    assert all(map(math.isfinite, loss.report().values())) and torch.isfinite(loss._moments.deviation)


def test_standardized_scores_follow_those_of_earlier_steps(anchors: Path) -> None:
    loss = adapt(anchors, standardize=True, standardize_decay=0.5)
    loss.before_step(1)
    tokens, seen = batch(), []
    for step in range(3):
        states = torch.randn(2, 32, WIDTH, generator=torch.Generator().manual_seed(step))
        loss.weights(states, tokens)
        mean, deviation = loss._moments.mean.item(), loss._moments.deviation.item()
        if not seen:
            assert (mean, deviation) == (0.0, 1.0)
        else:
            shares = [0.5 ** (len(seen) - n) for n in range(len(seen))]
            wanted = [sum(s * each[i] for s, each in zip(shares, seen)) / sum(shares) for i in (0, 1)]
            assert (mean, deviation**2) == pytest.approx(wanted, rel=1e-5)
        loss.after_step()
        seen.append([each.item() for each in loss._statistics.mean_and_variance("score")])


def test_the_centre_of_recent_samples_is_taken_out(anchors: Path) -> None:
    loss = adapt(anchors, center=True, refresh_every=1)
    loss.before_step(1)
    states, tokens = torch.randn(2, 32, WIDTH), batch(ignored=0)
    loss.weights(states, tokens)
    loss.after_step()
    raw = [pooled(hidden, *_with_weight(tokens.positions[row])) for row, hidden in enumerate(states)]
    every = torch.cat([each[each.any(-1)] for each in raw])
    loss.before_step(2)
    torch.testing.assert_close(loss.state_dict()["center"], every.mean(0))
    assert loss.state_dict()["samples"] == 0


def _with_weight(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    sample, place = samples(positions, None)
    return sample, place + 1


def test_a_state_that_is_restored_goes_on_as_if_never_stopped(anchors: Path) -> None:
    settings = dict(standardize=True, center=True, scale_outer_weight=True, refresh_every=2)

    def steps(loss: Adapt, first: int, last: int) -> torch.Tensor:
        for step in range(first, last):
            loss.before_step(step)
            states = torch.randn(2, 32, WIDTH, generator=torch.Generator().manual_seed(step))
            weights = loss.weights(states, batch(seed=step))
            loss.after_step()
            if step == 3:
                loss.after_sync()
        return weights

    whole, first, resumed = (adapt(anchors, **settings) for _ in range(3))
    steps(first, 1, 4)
    saved = {
        key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in first.state_dict().items()
    }
    resumed.load_state_dict(saved)
    assert torch.equal(steps(whole, 1, 7), steps(resumed, 4, 7))
    assert whole.outer_weight == resumed.outer_weight and 0 < whole.outer_weight < 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", 0.0),
        ("unit", "word"),
        ("max_anchors", 0),
        ("max_weight", -1.0),
        ("bm25_b", 2.0),
        ("min_tokens", -1),
    ],
)
def test_a_setting_out_of_range_is_named(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=key):
        Adapt.Config(**{key: value})
