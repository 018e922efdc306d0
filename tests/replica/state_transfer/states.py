"""States to transfer, and what makes two of them equal."""

import torch

STATE = {
    "states": {"params/0": {"w": {"global": torch.randn(3, 4), "outer.step": torch.tensor(3.0)}}},
    "empty": torch.empty(0, 4),
    "half": torch.arange(5).bfloat16(),
    "turned": torch.arange(6).reshape(2, 3).T,
    "plain": [1, 2.5, "x", None, True, {"deep": [torch.ones(2, dtype=torch.int64), torch.tensor(True)]}],
    "last": torch.empty(0, dtype=torch.bool),
}


def assert_same(left, right) -> None:
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right
