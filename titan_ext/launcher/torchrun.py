"""torchrun that passes on how a rank ended: torchrun itself exits with 1 whatever happened."""

import sys
from collections.abc import Sequence

from titan_ext.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun; returns 2 if a rank reported bad input, else the exit code of the rank that failed first."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    from titan_ext.replica.shutdown.failure import killed

    try:
        torchrun(list(sys.argv[1:] if arguments is None else arguments))
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        if line := killed(codes):
            print(line, file=sys.stderr, flush=True)
        first = error.get_first_failure()[1].exitcode
        code = UserError.exit_code if UserError.exit_code in codes.values() else first
        return 128 - code if code < 0 else code
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
