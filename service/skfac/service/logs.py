"""Where log records go, and what a line of them looks like."""

import json
import logging
import os
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from queue import Full, Queue
from typing import Literal

LogFormat = Literal["text", "json"]


LINES_KEPT = 10_000
"""Lines that wait to be written; those after them are lost."""

_LAST_WORDS_S = 1.0
_STANDARD_ERROR = 2


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time`, `level`, `logger`, `thread`, `message`, `error`.

    The message is the whole text: no attribute of a record or argument of a call gets
    into a line that the text does not have.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Write a record.

        Returns:
            A line, without its end.
        """
        when = datetime.fromtimestamp(record.created, UTC)
        line = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "thread": record.threadName,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class QueuedLogs(logging.Handler):
    """Writes records to a descriptor on a thread of its own: who logs never waits.

    A pipe that nobody reads blocks its writer once it is full, and some records are
    made under locks that all sessions share. Lines that find no room are counted, and
    once there is room again a line says how many they were.

    Args:
        descriptor: Of a file; bytes go there without Python's buffers and locks, which
            a thread that is blocked for ever would keep.
        formatter: Makes lines of records.
    """

    def __init__(self, descriptor: int, formatter: logging.Formatter) -> None:
        super().__init__()
        self._lines: Queue[str] = Queue(LINES_KEPT)
        self.setFormatter(formatter)
        self._descriptor = descriptor
        self._count: Callable[[], object] = lambda: None
        self._lost = 0
        threading.Thread(target=self._run, name="skfac-logs", daemon=True).start()

    def count_losses(self, count: Callable[[], object]) -> None:
        """Have something called for each line that is lost from now on."""
        self._count = count

    def emit(self, record: logging.LogRecord) -> None:
        """Let a record be written, or count it; logging holds the handler's lock."""
        try:
            if self._lost:
                self._lines.put_nowait(self._note(self._lost))
                self._lost = 0
            self._lines.put_nowait(self.format(record))
        except Full:
            self._lost += 1
            self._count()
        except Exception:  # a record that cannot be formatted; its maker goes on
            self.handleError(record)

    def flush(self) -> None:
        """Wait until all is written, but not for long."""
        with self._lines.all_tasks_done:
            self._lines.all_tasks_done.wait_for(
                lambda: not self._lines.unfinished_tasks, _LAST_WORDS_S
            )

    def _note(self, lost: int) -> str:
        text = f"{lost} lines of the log are lost: nobody read what was before them."
        args = (__name__, logging.WARNING, __file__, 0, text, None, None)
        return self.format(logging.LogRecord(*args))

    def _run(self) -> None:
        while True:
            rest = memoryview(f"{self._lines.get()}\n".encode(errors="replace"))
            try:
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
            except OSError:  # closed at the other end: there is nobody to tell
                pass
            self._lines.task_done()


def configure_logs(level: str, log_format: LogFormat) -> QueuedLogs:
    """Send all records to standard error.

    Args:
        level: Name of the least severe level, in any case.
        log_format: `"text"` or `"json"`.

    Returns:
        The handler, which has been installed.
    """
    text = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    json_lines = log_format == "json"
    formatter = JsonFormatter() if json_lines else logging.Formatter(text)
    handler = QueuedLogs(_STANDARD_ERROR, formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler])
    return handler
