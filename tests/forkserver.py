"""The one server of this process from which the tests fork theirs, without paying for the imports of each."""

import multiprocessing
from multiprocessing.context import ForkServerContext

_modules: list[str] = []


def forking(*modules: str) -> ForkServerContext:
    """The server, which imports these modules too when it starts: setting them would take those of other tests away."""
    context = multiprocessing.get_context("forkserver")
    _modules.extend(modules)
    context.set_forkserver_preload(_modules)
    return context
