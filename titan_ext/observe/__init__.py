"""What a run leaves behind: metrics by step and round, and a summary."""

from titan_ext.observe.journal import RunJournal
from titan_ext.observe.metrics import MetricsProcessor

__all__ = ["MetricsProcessor", "RunJournal"]
