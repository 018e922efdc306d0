"""torchtitan's loggers where their files cannot be written any more: training goes on without them."""

from typing import Any

from torchtitan.components.metrics import BaseLogger, LoggerContainer
from torchtitan.tools.logging import logger


def keep_going(loggers: BaseLogger) -> None:
    """Let no disk end training for the sake of a log.

    Args:
        loggers: torchtitan's, of TensorBoard and W&B.
    """
    if isinstance(loggers, LoggerContainer):
        loggers._loggers = [_WhileWritable(each) for each in loggers._loggers]


class _WhileWritable(BaseLogger):
    """A logger that is left alone after its first failure to write, which is reported."""

    def __init__(self, wrapped: BaseLogger) -> None:
        self._wrapped: BaseLogger | None = wrapped

    def log(self, metrics: dict[str, Any], step: int) -> None:
        if self._wrapped is None:
            return
        try:
            self._wrapped.log(metrics, step)
        except OSError as error:
            self._give_up(error, f"step {step} on")

    def close(self) -> None:
        if self._wrapped is None:
            return
        try:
            self._wrapped.close()
        except OSError as error:
            self._give_up(error, "what was logged last")

    def _give_up(self, error: OSError, what: str) -> None:
        name = type(self._wrapped).__name__
        self._wrapped = None
        logger.error("%s cannot write: %s: %s is missing there; training goes on", name, error.strerror or error, what)
