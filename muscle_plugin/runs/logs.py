"""The log file of a run, and what other libraries print while it trains."""

from __future__ import annotations

import contextlib
import io
import logging
import logging.handlers
import warnings
from collections.abc import Iterator
from pathlib import Path

#: Size at which log.txt is begun anew; the two before are kept.
LOG_BYTES = 10_000_000
#: Different warnings that the log takes from one call into USB's code.
LOGGED_WARNINGS = 200


@contextlib.contextmanager
def log_file(run_dir: Path) -> Iterator[logging.Logger]:
    """A logger that writes to ``log.txt`` only; older lines move to ``log.txt.1``, then ``.2``, then are deleted."""
    logger = logging.Logger(str(run_dir))  # outside logging's tree: no handler of another library prints it
    handler = logging.handlers.RotatingFileHandler(run_dir / "log.txt", "a", LOG_BYTES, backupCount=2, encoding="utf-8")
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # other files report a full disk
    handler.setFormatter(logging.Formatter("[%(asctime)s %(levelname)s] %(message)s"))
    logger.addHandler(handler)
    try:
        yield logger
    finally:
        with contextlib.suppress(OSError):
            handler.close()


class _LoggedLines(io.TextIOBase):
    def __init__(self, logger: logging.Logger | None) -> None:
        self._logger = logger

    def write(self, text: str) -> int:
        if self._logger is not None and text.strip():
            self._logger.info(text.rstrip())
        return len(text)


@contextlib.contextmanager
def output_to(logger: logging.Logger | None) -> Iterator[None]:
    """Log standard output, to which USB's classes print, and each warning once; without a logger drop them."""
    seen: set[str] = set()

    def show(message: Warning | str, *_: object, **__: object) -> None:
        text = str(message)
        if logger is not None and text not in seen and len(seen) < LOGGED_WARNINGS:
            seen.add(text)
            logger.warning(text)

    with contextlib.redirect_stdout(_LoggedLines(logger)), warnings.catch_warnings():
        warnings.showwarning = show
        yield
