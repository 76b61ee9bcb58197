"""Where log lines go and what they look like: stderr, key=value or JSON."""

import logging
import sys
from typing import Any, Literal

import structlog

LogFormat = Literal["text", "json"]
LOG_FORMATS: tuple[LogFormat, ...] = ("text", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")


def configure(format: LogFormat = "text", level: str = "info") -> None:  # noqa: A002 - the word of the flag
    """Set structlog up for this process: `text` is one line of key=value, `json` one object a line."""
    render: list[Any]
    if format == "json":
        # Without locals: a frame's variables can be somebody's prompt.
        traces = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        render = [structlog.processors.ExceptionRenderer(traces), structlog.processors.JSONRenderer()]
    else:
        order = ["timestamp", "level", "event"]
        render = [
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(key_order=order, drop_missing=True),
        ]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        # Looked up for each line: a bar on the terminal puts its own in place of it.
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
    )
