"""The worker's log: one record is one line, whatever producers call their tasks and models."""

from __future__ import annotations

import logging
import textwrap
from typing import Any

from celery.signals import after_setup_logger, after_setup_task_logger

from samphire_broker.shown import shown, shown_lines

_formatter = logging.Formatter()


class Escaping(logging.Filter):
    """Lets every record through, without the control characters of its message."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Escape a record; one that cannot be formatted is left to the handler, which says so."""
        try:
            message = record.getMessage()
        except Exception:  # noqa: BLE001 - raised here, it would meet whoever logs
            return True
        record.msg, record.args = shown(message.rstrip("\n")), None
        if isinstance(record.exc_info, tuple) and not record.exc_text:
            record.exc_text = _formatter.formatException(record.exc_info)
        if record.exc_text:
            # A traceback ends with the error's text, which may have lines of its own: indented they are no records.
            record.exc_text = _indented(record.exc_text)
        return True


def _indented(text: str) -> str:
    if text.startswith(" "):  # another handler has seen the record
        return text
    return textwrap.indent(shown_lines(text), "  ", lambda _line: True)


def escape(logger: logging.Logger, **_kwargs: Any) -> None:
    """Have all that a logger's handlers write escaped; Celery calls this once it has set them up."""
    for handler in logger.handlers:
        if not any(isinstance(known, Escaping) for known in handler.filters):
            handler.addFilter(Escaping())


after_setup_logger.connect(escape)
after_setup_task_logger.connect(escape)
