"""Rates and numbers of connections as users write them."""

import pytest

from titan_ext.semi_sync.wire.link import bytes_per_second, number_of_streams


@pytest.mark.parametrize(
    ("rate", "want"),
    [(None, 0.0), ("400mbit", 50e6), ("1.5 Gbit", 187.5e6), ("800kbit", 1e5), (" 8 mbit ", 1e6), ("2tbit", 25e10)],
)
def test_rates(rate: str | None, want: float) -> None:
    assert bytes_per_second(rate) == want


@pytest.mark.parametrize("rate", ["", "400", "400 mb", "-1mbit", "0mbit", "fast", "1e3mbit"])
def test_what_is_no_rate_says_what_is(rate: str) -> None:
    with pytest.raises(ValueError, match="max_rate = .*: must be (a rate such as 400mbit or 1gbit|above 0)"):
        bytes_per_second(rate)


def test_numbers_of_connections() -> None:
    assert [number_of_streams(each) for each in ("auto", 1, 64)] == [0, 1, 64]
    for wrong in (0, 65, -1, True, "eight"):
        with pytest.raises(ValueError, match='streams = .*: must be "auto" or a number from 1 to 64'):
            number_of_streams(wrong)
