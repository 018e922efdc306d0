"""What every reproduction does with an option that cannot be."""

from collections.abc import Sequence

import pytest

from titan_ext import cli
from titan_ext.errors import UserError


def assert_one_line(arguments: Sequence[str], said: str, capsys: pytest.CaptureFixture) -> None:
    """The command ends with a line that says so, and with the code of a user's mistake."""
    try:
        code = cli.main([*arguments])
    except UserError as error:
        assert said in str(error)
        return
    assert code == 2 and said in capsys.readouterr().err
