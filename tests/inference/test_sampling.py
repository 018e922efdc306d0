"""From logits to tokens, and from tokens to text."""

import pytest
import torch

from titan_ext.data import ByteTokenizer
from titan_ext.inference.sampling import Sampler, TextStream

LOGITS = torch.log(torch.tensor([0.1, 0.4, 0.2, 0.3]))


def shares(sampler: Sampler, draws: int = 1500) -> list[float]:
    drawn = torch.tensor([sampler(LOGITS) for _ in range(draws)])
    return (torch.bincount(drawn, minlength=4) / draws).tolist()


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.0}, [0, 1, 0, 0]),
        ({"temperature": 0.5}, [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.01}, [0, 1, 0, 0]),
        ({"top_p": 0.8}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_k": 2, "top_p": 0.5}, [0, 1, 0, 0]),
        ({"vocabulary": 3}, [0.1 / 0.7, 0.4 / 0.7, 0.2 / 0.7, 0]),
    ],
)
def test_tokens_come_as_often_as_they_should(settings, expected):
    assert shares(Sampler(**{"vocabulary": 4} | settings)) == pytest.approx(expected, abs=0.05)


def test_the_seed_decides():
    first, again, other = (Sampler(4, seed=seed) for seed in (1, 1, 2))
    drawn = [[sampler(LOGITS) for _ in range(50)] for sampler in (first, again, other)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_text_comes_by_whole_characters():
    stream, said = TextStream(ByteTokenizer()), "naïve €5 🙂"
    pieces = [stream.push(byte) for byte in said.encode()]
    assert [piece for piece in pieces if piece] == list(said) and stream.flush() == ""
    assert stream.text == said


def test_bytes_that_are_no_character_come_at_last():
    stream = TextStream(ByteTokenizer())
    assert [stream.push(byte) for byte in b"a\xffb\xe2\x82"] == ["a", "", "\ufffdb", "", ""]
    assert stream.flush() == "\ufffd"
