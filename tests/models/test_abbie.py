"""AbbIE's recurrence against the standard decoder and against the recurrence written out."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from tests.models.abbie_models import LENGTH, batch, build, unrolled
from titan_ext.models.abbie.iterations import Iterations
from titan_ext.models.abbie.model import PerBlock

SKIPS = ["prev", "input", "none"]


def states(model, iterations: int) -> list[torch.Tensor]:
    """What the body is given in each iteration, and the tail at last."""
    inputs = batch()
    start = state = model.head_forward(**inputs)
    found = [start]
    for k in range(iterations):
        output = model.body_forward(state, start, inputs["positions"], inputs["attention_masks"], iteration=k)
        state = model.next_state(output, state, start, last=k == iterations - 1)
        found.append(state)
    return found


@pytest.mark.parametrize("skip", SKIPS)
def test_one_iteration_is_the_standard_decoder_bit_for_bit(skip):
    ours, standard = build(skip=skip), build("llama3")
    assert ours.state_dict().keys() == standard.state_dict().keys()
    assert all(torch.equal(value, standard.state_dict()[name]) for name, value in ours.state_dict().items())
    logits = [ours(**batch(), iterations=1), standard(**batch())]
    assert torch.equal(*logits)
    for each in logits:
        each.square().sum().backward()
    for mine, theirs in zip(ours.parameters(), standard.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_the_literal_formula_is_not():
    assert not torch.equal(build(final_skip=True)(**batch(), iterations=1), build("llama3")(**batch()))


@pytest.mark.parametrize("skip, final_skip, r", list(itertools.product(SKIPS, [False, True], [1, 2, 3])))
def test_logits_and_gradients_are_those_of_untied_copies(skip, final_skip, r):
    if skip == "none" and final_skip:
        return
    ours, reference = build(skip=skip, final_skip=final_skip), build()
    logits = ours(**batch(), iterations=r)
    expected, clones = unrolled(reference, r, skip, final_skip)
    assert torch.equal(logits, expected)
    for each in (logits, expected):
        F.cross_entropy(each.flatten(0, 1), batch(1)["tokens"].flatten()).backward()
    for layer, block in ours.layers.items():
        copies = [clone[int(layer) - 1] for clone in clones] if int(layer) in (1, 2) else [reference.layers[layer]]
        for name, parameter in block.named_parameters():
            total = sum(clone.get_parameter(name).grad for clone in copies)
            torch.testing.assert_close(parameter.grad, total, rtol=1e-5, atol=1e-7)
    for name in ("tok_embeddings.weight", "norm.weight", "lm_head.weight"):
        torch.testing.assert_close(ours.get_parameter(name).grad, reference.get_parameter(name).grad)


def test_previous_and_input_differ_from_the_third_iteration_on():
    prev, given = build(skip="prev"), build(skip="input")
    equal = [torch.equal(prev(**batch(), iterations=r), given(**batch(), iterations=r)) for r in (1, 2, 3)]
    assert equal == [True, True, False]


def test_norms_double_under_d_and_settle_under_c():
    def ratios(found):
        return [(b.norm() / a.norm()).item() for a, b in zip(found, found[1:])]

    def angles(found):
        pairs = zip(found, found[1:])
        return [1 - F.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item() for a, b in pairs]

    # The last state adds no skip.
    d, c = states(build(skip="prev"), 8)[:-1], states(build(skip="none"), 8)
    assert ratios(d)[-1] == pytest.approx(2, rel=0.02)
    shrinks = [a / b for a, b in zip(angles(d), angles(d)[1:])][-3:]
    assert all(3 < shrink < 5 for shrink in shrinks), shrinks
    assert abs(ratios(c)[-1] - 1) < abs(ratios(c)[0] - 1) and ratios(c)[-1] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("r", [1, 2, 4])
def test_causal_and_independent_of_the_batch(r):
    model, inputs = build(), batch()
    logits = model(**inputs, iterations=r)
    changed = inputs["tokens"].clone()
    changed[:, 10] += 1
    changed %= 64
    after = model(**(inputs | {"tokens": changed}), iterations=r)
    assert torch.equal(logits[:, :10], after[:, :10]) and not torch.equal(logits[:, 10:17], after[:, 10:17])
    assert torch.equal(logits[:, 17:], after[:, 17:]), "the next document sees nothing of it"
    alone = model(**{name: value[:1] for name, value in inputs.items()}, iterations=r)
    torch.testing.assert_close(alone, logits[:1], rtol=1e-5, atol=1e-6)


def test_a_body_that_writes_nothing():
    """C then ignores the iterations, and D scales the tail's input by 2^(r-1), exactly."""
    for skip, factor in (("none", 1), ("prev", 2)):
        model = build(skip=skip)
        for layer in ("1", "2"):
            torch.nn.init.zeros_(model.layers[layer].attention.wo.weight)
            torch.nn.init.zeros_(model.layers[layer].feed_forward.w2.weight)
        for r in (1, 2, 5):
            start, *_, end = states(model, r)
            assert torch.equal(end, start * factor ** (r - 1))


def test_between_iterations():
    start, halved, _ = states(build(between="mean"), 2)
    assert torch.equal(halved, states(build(), 2)[1] / 2)
    normed = states(build(between="norm"), 3)[1:3]
    for state in normed:
        torch.testing.assert_close(state.square().mean(-1), torch.ones(state.shape[:2]), rtol=1e-3, atol=0)
    one = batch()
    assert torch.equal(build(between="norm")(**one, iterations=1), build("llama3")(**one))


def test_truncated_gradients():
    """With the input added, the head learns from the last iteration's copy of it."""
    whole, last = build(skip="input"), build(skip="input", backprop_iterations=1)
    for model in (whole, last):
        model(**batch(), iterations=3).sum().backward()
    assert torch.equal(whole(**batch(), iterations=3), last(**batch(), iterations=3))
    body = [model.layers["1"].attention.wo.weight.grad for model in (whole, last)]
    assert not torch.allclose(*body) and torch.allclose(*[m.lm_head.weight.grad for m in (whole, last)])


def truncated_reference(model, r, kept, final_skip, between):
    """Logits of ``skip = "input"`` with the graph cut before the last ``kept`` applications of the body."""
    inputs = batch()
    through = lambda blocks, h: [h := block(h, inputs["attention_masks"], inputs["positions"]) for block in blocks][-1]
    blocks = list(model.layers.values())
    h0 = u = through(blocks[:1], model.tok_embeddings(inputs["tokens"]))
    for k in range(r):
        y = through(blocks[1:3], u)
        if k < r - kept:
            y = y.detach()
        u = y + h0 if k < r - 1 or final_skip else y
        if k < r - 1 and between != "none":
            u = u / 2 if between == "mean" else F.rms_norm(u, u.shape[-1:])
    return model.lm_head(model.norm(through(blocks[3:], u)))


@pytest.mark.parametrize("between", ["none", "mean", "norm"])
@pytest.mark.parametrize("final_skip", [False, True])
@pytest.mark.parametrize("r, kept", list(itertools.product([1, 2, 3], [1, 2, 5])))
def test_truncated_gradients_reach_head_and_embedding(r, kept, final_skip, between):
    settings = dict(skip="input", final_skip=final_skip, between=between)
    ours, reference = build(backprop_iterations=kept, **settings), build(**settings)
    logits, expected = ours(**batch(), iterations=r), truncated_reference(reference, r, kept, final_skip, between)
    assert torch.equal(logits, expected)
    for each in (logits, expected):
        F.cross_entropy(each.flatten(0, 1), batch(1)["tokens"].flatten()).backward()
    for (name, mine), theirs in zip(ours.named_parameters(), reference.parameters(), strict=True):
        assert mine.grad is not None and mine.grad.any(), name
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("r, kept", list(itertools.product([1, 2, 3], [1, 2, 5])))
def test_truncated_gradients_of_the_depth_baseline_reach_everything(r, kept):
    model, whole = build(variant="depth", backprop_iterations=kept), build(variant="depth")
    for each in (model, whole):
        each(**batch(), iterations=r).square().sum().backward()
    grads = [dict(each.named_parameters()) for each in (model, whole)]
    for name, parameter in grads[0].items():
        assert parameter.grad is not None and parameter.grad.any(), name
        if kept >= r:
            assert torch.equal(parameter.grad, grads[1][name].grad), name


def test_each_application_of_a_block_can_have_its_own_mask():
    """What a key-value cache needs: one entry for each iteration and layer."""
    model, inputs, asked = build(), batch(), []

    class Recorded(PerBlock):
        def at(self, iteration, layer):
            asked.append((iteration, layer))
            return inputs["attention_masks"]

    logits = model(**(inputs | {"attention_masks": Recorded()}), iterations=3)
    assert torch.equal(logits, model(**inputs, iterations=3))
    assert asked == [(0, 0), *((k, layer) for k in range(3) for layer in (1, 2)), (0, 3), (0, 4)]


def test_iterations_of_training_and_evaluation():
    model = build(iterations=3, eval_iterations=5)
    inputs = batch()
    assert torch.equal(model(**inputs), model(**inputs, iterations=5))
    assert torch.equal(model.train()(**inputs), model(**inputs, iterations=3))
    assert build(iterations=3).config.iterations.evaluate == 3


@pytest.mark.parametrize("sampling", ["uniform", "poisson"])
def test_sampled_iterations_depend_on_seed_and_step_alone(sampling):
    schedule = Iterations(train=4, sampling=sampling, most=7)
    drawn = [schedule.at(3, step) for step in range(400)]
    assert drawn == [schedule.at(3, step) for step in range(400)]
    assert drawn != [schedule.at(4, step) for step in range(400)]
    assert min(drawn) == 1 and max(drawn) == 7
    assert schedule.mean == pytest.approx(4, abs=0.3)
    model = build(iterations=4, iteration_sampling=sampling).train()
    model.config.seed = 3
    for step in range(20):
        model.set_step(step)
        assert model.num_iterations == drawn[step]


def test_fp32_stream_keeps_what_bfloat16_loses():
    """At 8 iterations the stream has grown 2^7 times; bfloat16 has 8 bits for what is added to it."""

    def tail_input(wide: bool, weights: torch.dtype) -> torch.Tensor:
        model, inputs = build(fp32_residual=wide), batch()
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().to(weights)
        start = model.head_forward(**inputs)
        state = model.iterate(start, 8, inputs["positions"], inputs["attention_masks"])
        assert state.dtype is (torch.float32 if wide else weights)
        return state.detach().float()

    exact = tail_input(False, torch.float32)
    wide, narrow = tail_input(True, torch.bfloat16), tail_input(False, torch.bfloat16)
    assert torch.equal(exact, tail_input(True, torch.float32))
    error, narrow_error = ((each - exact).norm() / exact.norm() for each in (wide, narrow))
    assert error < narrow_error / 4, (error, narrow_error)


def test_operations_are_counted_with_the_iterations():
    """Against the operations that ran: thrice the forward pass, and 6 for each element of a norm."""
    from torch.utils.flop_counter import FlopCounterMode

    for r in (1, 2, 4):
        model = build(iterations=r).train()
        with FlopCounterMode(display=False) as counter:
            model(**batch())
        parameters, operations = model.config.get_nparams_and_flops(model, LENGTH)
        norms = 32 * (2 * (3 + 2 * r) + 1)
        assert operations == 3 * counter.get_total_flops() / batch()["tokens"].numel() + 6 * norms
        assert parameters == sum(each.numel() for each in model.parameters())
