"""Logging of the commands, and suppression of upstream messages."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from ..data.messages import printable

LEVELS = ("debug", "info", "warning", "error")

logger = logging.getLogger("stepdpo_trl")


def log_options(parser: argparse.ArgumentParser) -> None:
    """Add `--log-level` and `--log-file`."""
    parser.add_argument("--log-level", choices=LEVELS, default="warning", help="Least severe messages to print.")
    parser.add_argument("--log-file", metavar="FILE", help="Append the messages to this file, with time and level.")


class _PrintableFormatter(logging.Formatter):
    """Formatter that escapes control characters: messages may quote a server, a model or a file."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _TerminalHandler(logging.Handler):
    """Handler that prints messages to stderr, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        if not getattr(record, "printed", False):
            tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def logging_to(level: str | None, file: str | None) -> Iterator[None]:
    """
    Print log records of the package to stderr, and append them to a file, until the context ends.

    Args:
        level (`str`, *optional*):
            A name in `LEVELS`, defaults to `"warning"`.
        file (`str`, *optional*):
            The file.

    Raises:
        OSError: If the file cannot be written.
    """
    handlers: list[logging.Handler] = [_TerminalHandler()]
    handlers[0].setFormatter(_PrintableFormatter())
    if file is not None:
        to_file = logging.FileHandler(file, encoding="utf-8")
        to_file.setFormatter(_PrintableFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        handlers.append(to_file)
    before = logger.level
    logger.setLevel((level if level in LEVELS else "warning").upper())
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        logger.setLevel(before)
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


def report_error(message: str) -> None:
    """Print an error to stderr, and write it to the log file."""
    print(printable(message), file=sys.stderr)
    if logger.handlers:  # otherwise Python would print the record a second time
        logger.error(message, extra={"printed": True})


def silence_upstream() -> None:
    """
    Suppress messages of dependencies that users of the commands cannot act on.

    Without a terminal, their progress bars are disabled or redrawn once a minute. Messages are matched by logger and
    text, so that everything else is still printed.
    """
    # Printed on import because of a missing optional kernel; 4-bit layers work without it
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
        lambda record: "Failed to load CPU gemm_4bit_forward" not in record.getMessage()
    )
    # TRL and PEFT still use the old names
    warnings.filterwarnings("ignore", r"`\w*gradient_checkpointing\w*` is deprecated", FutureWarning)
    if not sys.stderr.isatty():
        bars = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        for name, value in {**bars, "TQDM_MININTERVAL": "60", "TQDM_NCOLS": "80"}.items():
            os.environ.setdefault(name, value)
