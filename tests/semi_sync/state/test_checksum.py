"""The checksum of the shared state: equal however a site cuts its tensors, another for any single difference."""

import hashlib

import numpy as np
import pytest
import torch

from titan_ext.semi_sync import SemiSyncConfig, SiteOptions, SiteRanks, resolve
from titan_ext.semi_sync.bind import bind_states
from titan_ext.semi_sync.state import checksum
from titan_ext.semi_sync.state.checksum import SharedChecksum, model_checksum, state_checksum
from titan_ext.semi_sync.state.views import ModelView

ALONE = SiteRanks(alone=True)
BITS = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int32}
HALF = 2**32 - 1
MASK = HALF | HALF << 64


def everything(name: str) -> bool:
    return True


def reference(state: dict) -> int:
    """Written out with Python's integers: beside each other the sum of the bits and that of their squares, each times the
    name's hash."""
    total = 0
    for name, values in state.items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor) and value.dim():
                raw = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                numbers = np.frombuffer(raw, BITS[value.element_size()]).tolist()
                digest = hashlib.sha256(f"{name}|{key}".encode()).digest()[:8]
                label = int.from_bytes(digest, "big") | 1
                total += label * sum(numbers) % 2**32 + (label * sum(each * each for each in numbers) % 2**32 << 64)
    return total & MASK


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (2, 0, 4)])
def test_it_is_the_sum_written_out(dtype, shape):
    torch.manual_seed(0)
    state = {name: {"value": (torch.randn(shape) * 100).to(dtype)} for name in ("a", "b")}
    assert state_checksum(state, everything) == reference(state)


def test_large_tensors_are_summed_piece_by_piece(monkeypatch):
    state = {"a": {"value": torch.randn(37)}}
    whole = state_checksum(state, everything)
    monkeypatch.setattr(checksum, "_PIECE", 5)
    assert state_checksum(state, everything) == whole == reference(state)


@pytest.mark.parametrize("cut", [0, 1, 4, 11])
@pytest.mark.parametrize("dim", [0, 1])
def test_shards_add_up_to_the_whole(cut, dim):
    value = torch.randn(12, 12)
    whole = state_checksum({"a": {"value": value}}, everything)
    shards = [value.narrow(dim, 0, cut), value.narrow(dim, cut, 12 - cut)]
    assert sum(state_checksum({"a": {"value": shard}}, everything) for shard in shards) & MASK == whole


def test_of_equal_shards_one_counts():
    state = {"a": {"value": torch.randn(4)}, "b": {"value": torch.randn(4)}}
    parts = [state_checksum(state, lambda name, own=own: name == own) for own in ("a", "b")]
    assert sum(parts) & MASK == state_checksum(state, everything)


def test_any_single_difference_changes_it():
    torch.manual_seed(1)
    value = torch.randn(6, 4)
    seen = {state_checksum({"a": {"value": value}}, everything)}
    for place in range(value.numel()):
        other = value.clone().view(-1)
        other.view(torch.int32)[place] += 1  # the next float
        seen.add(state_checksum({"a": {"value": other}}, everything))
    assert len(seen) == 1 + value.numel()


def test_names_and_keys_count():
    one, other = torch.randn(3), torch.randn(3)
    seen = {
        state_checksum(state, everything)
        for state in (
            {"a": {"x": one}, "b": {"x": other}},
            {"a": {"x": other}, "b": {"x": one}},
            {"a": {"x": one, "y": other}},
            {"a": {"y": one, "x": other}},
        )
    }
    assert len(seen) == 4


def test_minus_zero_is_not_zero():
    assert state_checksum({"a": {"x": torch.tensor([0.0])}}, everything) != state_checksum(
        {"a": {"x": torch.tensor([-0.0])}}, everything
    )


def test_plain_values_and_steps_do_not_count():
    state = {"a": {"value": torch.randn(3)}}
    more = {"a": {**state["a"], "step": torch.tensor(7.0), "note": "text", "count": 3}}
    assert state_checksum(more, everything) == state_checksum(state, everything)


def bound(method: str, value: float = 1.0, **settings):
    """The states of a model of two layers, and the model."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
    for parameter in model.parameters():
        parameter.data.fill_(value)
    plan = resolve(SemiSyncConfig(method=method, sync_every=4, **settings))
    return bind_states(plan, ModelView([model], []), SiteOptions(ranks=ALONE)), model


def test_what_has_not_changed_is_not_read_again():
    states, _ = bound("diloco", num_fragments=2)
    sums = SharedChecksum(states, ALONE, everything)
    before = sums.after(())
    assert 0 < before < 2**62
    for state in states:
        state.global_flat.fill_(5.0)
    assert sums.after(()) == before
    one = sums.after({states[0].key})
    both = sums.after({states[1].key})
    assert len({before, one, both}) == 3
    again = SharedChecksum(states, ALONE, everything)
    assert again.after(()) == both
    for state in states:
        state.global_flat.fill_(1.0)
    again.forget()
    assert again.after(()) == before


def test_it_covers_the_outer_optimizer():
    states, _ = bound("diloco")
    sums = SharedChecksum(states, ALONE, everything)
    before = sums.after(())
    momentum = next(iter(states[0].outer.state.values()))["momentum_buffer"]
    momentum.add_(1)
    assert sums.after({states[0].key}) != before


def test_without_anything_that_is_equal_at_all_sites_it_is_0():
    states, _ = bound("eager_diloco")
    assert SharedChecksum(states, ALONE, everything).after(()) == 0


def test_the_checksum_of_a_model_does_not_depend_on_its_method_or_fragments():
    sums = {
        model_checksum(bound(method, **settings)[0], ALONE, everything)
        for method, settings in (("diloco", {}), ("diloco", {"num_fragments": 2}), ("local_sgd", {}))
    }
    assert len(sums) == 1 and 0 < sums.pop() < 2**62
    assert model_checksum(bound("diloco", 2.0)[0], ALONE, everything) != model_checksum(
        bound("diloco")[0], ALONE, everything
    )
