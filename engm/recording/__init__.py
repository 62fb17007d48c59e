"""Training steps recorded once as straight-line programs of operators, and replayed without hooks, plans and rules."""

from .step import RecordedStep, Report, record

__all__ = ["RecordedStep", "Report", "record"]
