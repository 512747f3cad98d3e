"""What transformers prints while it loads a model, silenced: the command line shows its own progress and errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def without_load_report() -> Iterator[None]:
    """Silence the report on a new head: it is missing in the file because it is new."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Silence the bars of transformers while it reads weights; the command line shows its own progress."""
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
