"""Variables of the environment neither change a run in silence nor end it with a traceback."""

import pytest

from titan_ext.errors import UserError
from titan_ext.launcher.surroundings import check_variables, set_aside
from titan_ext.replica.address import lighthouse_url


def test_what_torchrun_and_torchft_would_read_is_taken_away_and_said() -> None:
    environment = {
        "PET_NNODES": "2",
        "TORCHFT_QUORUM_TIMEOUT_SEC": "abc",
        "TORCHFT_LIGHTHOUSE": "http://h:1",
        "HOME": "/",
    }
    notes = set_aside(environment)
    assert environment == {"TORCHFT_LIGHTHOUSE": "http://h:1", "HOME": "/"}
    assert notes[0].startswith("the variable PET_NNODES = '2' is not read: ")
    assert notes[1].endswith("TORCHFT_QUORUM_TIMEOUT_SEC = 'abc' is not read: replica.quorum_timeout_seconds counts")


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("TORCH_DISTRIBUTED_DEBUG", "DETAILS", "must be one of OFF, INFO, DETAIL (did you mean 'DETAIL'?)"),
        ("TORCHFT_WATCHDOG_TIMEOUT_SEC", "1.5", "must be a whole number of seconds"),
        ("TITAN_STRUCT_LOGGER_HANDLERS", "mine", "must be dotted paths of functions"),
        ("GLOO_SOCKET_IFNAME", "nothing7", "no such interface; this machine has"),
    ],
)
def test_values_that_a_library_would_stumble_over_are_refused(name: str, value: str, words: str) -> None:
    with pytest.raises(UserError) as raised:
        check_variables({name: value})
    assert name in str(raised.value) and value in str(raised.value) and words in str(raised.value)


def test_good_values_pass() -> None:
    check_variables(
        {"TORCH_DISTRIBUTED_DEBUG": "detail", "GLOO_SOCKET_IFNAME": "lo", "TITAN_STRUCT_LOGGER_HANDLERS": "a.b, c.d"}
    )


def test_an_address_in_the_environment_is_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHFT_LIGHTHOUSE", "somewhere")
    with pytest.raises(UserError, match='^the variable TORCHFT_LIGHTHOUSE = "somewhere": must be host:port'):
        lighthouse_url(None)
