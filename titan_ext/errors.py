"""The two ways a command ends badly without it being a bug of ours."""


class UserError(ValueError):
    """Something the user gave cannot work: reported as one line, exit code 2."""

    exit_code = 2


class RunError(RuntimeError):
    """The world outside failed (a lighthouse, a disk, a peer): reported as one line, exit code 1."""

    exit_code = 1
