"""The worker's log: one record is one line, whatever producers call their tasks and models; and what happens again and
again while a trouble lasts is told at first, and then once a minute.
"""

from __future__ import annotations

import logging
import textwrap
import time
from collections.abc import Callable
from typing import Any

from celery.signals import after_setup_logger, after_setup_task_logger

from samphire_broker.shown import shown, shown_lines

REPEATED = {
    *("beat_failed", "broker_away", "catalogue_failed", "claim_failed", "clock_failed", "count_failed"),
    *("discovery_failed", "events_failed", "lead_failed", "letters_failed", "listen_failed", "look_failed"),
    *("not_alone", "observer_failed", "reap_failed", "right_missing", "sent_failed", "time_failed", "watch_failed"),
}
"""Actions that are logged at each try for as long as a trouble lasts."""
REPEAT_S = 60.0
PLACES_MAX = 1000
"""Lines that are told apart, by where they are logged and what they are about (a model, a queue)."""

_formatter = logging.Formatter()


class Repeats(logging.Filter):
    """Lets what is repeated through once in `every_s` seconds, with the number of those that it has kept back.

    Args:
        every_s: how long others like it are kept back.
        clock: in s; it is never set.
    """

    def __init__(self, every_s: float = REPEAT_S, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._every_s = every_s
        self._clock = clock
        self._kept_back: dict[tuple[str, int, str], int] = {}
        self._silent_until: dict[tuple[str, int, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is written."""
        if getattr(record, "action", None) not in REPEATED:
            return True
        about = record.args[:-1] if isinstance(record.args, tuple) else ()  # the last one is the error
        place = record.name, record.lineno, str(about)
        now = self._clock()
        if now < self._silent_until.get(place, now):
            self._kept_back[place] += 1
            return False
        if len(self._silent_until) >= PLACES_MAX:
            self._silent_until.clear()
            self._kept_back.clear()
        kept_back, self._kept_back[place] = self._kept_back.get(place, 0), 0
        self._silent_until[place] = now + self._every_s
        if kept_back:
            record.msg, record.args = f"{record.getMessage()} ({kept_back} more like this since the last line)", None
        return True


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


def filter_log(logger: logging.Logger, **_kwargs: Any) -> None:
    """Have all that a logger's handlers write go through these filters; Celery calls this once it has set them up."""
    for handler in logger.handlers:
        if not any(isinstance(known, Escaping) for known in handler.filters):
            handler.addFilter(Repeats())
            handler.addFilter(Escaping())


after_setup_logger.connect(filter_log)
after_setup_task_logger.connect(filter_log)
