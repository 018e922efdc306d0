"""What leaves a site is clipped and noised: all of it."""

import secrets

import pytest
import torch
from torch import nn

from tests.semi_sync.methods.test_worldlm import (
    KEYS,
    MISPLACED,
    Model,
    between_kinds,
    config_of,
    key_states,
    options_of,
    run,
    set_keys,
    values,
)
from tests.semi_sync.wire.test_bytes import Counter
from titan_ext.semi_sync.state.routed_keys import RoutedKeys
from titan_ext.semi_sync.testing import InProcessSites

CLIP, HUGE = 0.5, 1e44


class Recorder(Counter):
    """All that a site gives to the wire."""

    def __init__(self, group):
        super().__init__(group)
        self.messages = []

    def send(self, tensors, dst_rank, tag):
        self.messages.append((dst_rank, tensors[0].clone().view(torch.uint8)))
        return super().send(tensors, dst_rank, tag)


def messages_of_third(own, drift, codec):
    """What the third site, which is misplaced, sends in four rounds in which its layers drift so far."""
    sites = InProcessSites(len(MISPLACED))
    managers = sites.managers()
    recorder = managers[2]._process_group = Recorder(managers[2]._process_group)
    summed = managers[2].allreduce

    def allreduce(tensor, *, reduce_op):
        if tensor.is_floating_point():  # the statuses, whole numbers, tell the time and the shared state's checksum
            recorder.messages.append((None, tensor.clone().view(torch.uint8)))
        return summed(tensor, reduce_op=reduce_op)

    managers[2].allreduce = allreduce
    sites.managers = lambda: managers
    models = [between_kinds() for _ in MISPLACED]
    config = config_of(
        dict(federations=1, routing_share=1.0, routing_similarity=-1.0, temperature=0.05, **own),
        sync_every=1,
        codec=codec,
        topology="regions",
    )
    outer = sites.outer_loops(config, models, options=options_of(MISPLACED))
    for step in range(1, 5):
        set_keys(step, models)
        for parameter in models[2].parameters():
            parameter.data.add_(drift)
        sites.at_once(lambda site: outer[site].step(tokens=4))
    sites.close()
    return recorder.messages, models[2]


def third_fits_worst(self, told):
    """Every layer is for the last site's federation; those of the third site go first."""
    target = told.labels["region/1"][-1]
    return dict.fromkeys(range(len(self._tree.sketches.units)), (target, 1.0 if told.rank == 2 else 0.5))


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_nothing_that_leaves_depends_on_what_was_not_noised(codec, monkeypatch):
    """Clipped to next to nothing, under noise from one seed, any two updates of a site are one to all others: values,
    sketches, norms and residuals. Its own layers keep what it learned."""
    monkeypatch.setattr(secrets, "randbits", lambda bits: 5)
    monkeypatch.setattr(RoutedKeys, "_badly_placed", third_fits_worst)
    private = dict(clip=1e-45, noise=HUGE)
    one, first = messages_of_third(private, 0.1, codec)
    other, second = messages_of_third(private, -0.3, codec)
    assert len(one) == len(other) > 20
    for (to, message), (to_other, message_other) in zip(one, other):
        assert to == to_other and torch.equal(message, message_other)
    assert all(not torch.equal(values(first)[name], values(second)[name]) for name in KEYS)
    bare, _ = messages_of_third({}, 0.1, codec)
    bare_other, _ = messages_of_third({}, -0.3, codec)
    assert any(a.shape != b.shape or not torch.equal(a, b) for (_, a), (_, b) in zip(bare, bare_other))


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(2))


@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_updates_are_clipped_and_noise_has_its_size(noise):
    """One site alone: what it sends is what becomes of both the backbone and the root's key layers."""
    config = config_of(dict(clip=CLIP, noise=noise, key_blocks=0.5, keys=[]), sync_every=1, outer_optimizer="average")
    start = values(Wide())
    seen = []
    for _ in range(2):
        outer, models = run(config, ["a"], 1, models=[Wide()])
        keys = key_states(outer[0])[0].global_parts[0] - start["layers.1.weight"]
        seen.append((values(models[0])["layers.0.weight"] - start["layers.0.weight"], keys))
        for update in seen[-1]:
            if noise:
                assert update.std().item() == pytest.approx(CLIP * noise, rel=0.1)
            else:
                assert update.norm().item() == pytest.approx(CLIP, rel=1e-4)
    assert all(torch.equal(one, other) is not bool(noise) for one, other in zip(*seen))


def test_small_updates_are_not_stretched():
    config = config_of(dict(clip=1e6), sync_every=2)
    _, models = run(config, ["a", "a"], 4)
    _, plain = run(config_of(sync_every=2), ["a", "a"], 4)
    for one, other in zip(models, plain):
        assert all(torch.allclose(value, values(other)[name], atol=1e-6) for name, value in values(one).items())


def test_buffers_that_would_travel_bare_are_refused():
    model = Model()
    model.register_buffer("running", torch.zeros(2))
    with pytest.raises(ValueError, match="the buffer running would travel as it is"):
        InProcessSites(1).outer_loops(config_of(dict(clip=1.0, noise=1.0)), [model], options=[{"name": "a"}])


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (dict(clip=-1.0), "clip = -1.0"),
        (dict(noise=-1.0, clip=1.0), "noise = -1.0"),
        (dict(noise=1.0), "clip = 0.0: must be above 0 with noise"),
    ],
)
def test_what_cannot_be_is_refused_by_name(own, words):
    with pytest.raises(ValueError, match=words):
        InProcessSites(1).outer_loops(config_of(own), [Model()], options=[{"name": "a"}])
