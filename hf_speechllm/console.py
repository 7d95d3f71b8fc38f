"""Output of commands: log lines, progress bars, tables, the closing summary.

Results go to standard output, log lines and progress bars to standard error. Rich formats tables and the summary on a
terminal; elsewhere they are plain lines.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
BAR_DELAY = 2.0  # seconds before a bar of transformers appears
LINE_INTERVAL = 30.0  # seconds between progress lines without a terminal
# Lines of libraries that users cannot act on: logger, part of the message.
SILENCED = (
    ("transformers", "The tokenizer has new PAD/BOS/EOS tokens"),  # the processor decides these tokens
    # Only evaluations that select no checkpoint lack the metric; a wrong name is refused before training.
    ("transformers", "early stopping required metric_for_best_model"),
    # A resumed run compares all options that matter; a share of the run never equals the steps in the file.
    ("transformers", "do not match the ones in the `trainer_state.json`"),
    ("huggingface_hub", "Retrying in"),
    ("DeepSpeed", "Setting accelerator to CPU"),  # also on a machine that is meant to have no GPU
)
_CURSOR = re.compile(r"(?:\s|\x1b\[A)*")  # bars between other output: line breaks, spaces, line up
_NUMBERS = re.compile(r"[:\d]")
_BLOCKS = re.compile(r"\|[^|]*\|")
_WARNING = re.compile(r"^.*?:\d+: (\w+: .*?)(?:\n  .*)?\n?$", re.DOTALL)  # `warnings.formatwarning`


class LogFormatter(logging.Formatter):
    """Formats a record as its message; warnings and errors start with their level and the name of the library.

    Args:
        timestamps: whether lines start with the time.
    """

    def __init__(self, timestamps: bool = False):
        super().__init__("%(asctime)s %(message)s" if timestamps else "%(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line to print."""
        record = logging.makeLogRecord(vars(record))
        message = record.getMessage()
        if record.name == "py.warnings":
            message = python_warning(message)
        if record.levelno >= logging.WARNING:
            library = record.name.partition(".")[0]
            named = library in ("hf_speechllm", "py", "root", "__main__")
            message = f"{record.levelname.lower()}: {'' if named else f'{library}: '}{message}"
        record.msg, record.args = message, None
        return super().format(record)


class LineHandler(logging.StreamHandler):
    """Prints lines to standard error, above the progress bars; a warning of Python or the Hub's client only once."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: set[str] = set()  # libraries change the filters that should do this

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a record."""
        try:
            line = self.format(record)
            if record.name.partition(".")[0] in ("py", "huggingface_hub"):
                text = python_warning(record.getMessage())
                if text in self._shown:
                    return
                self._shown.add(text)
            tqdm.write(line, file=sys.stderr)
        except Exception:
            self.handleError(record)


def python_warning(text: str) -> str:
    """Returns category and message of a formatted warning, without file and source line."""
    return _WARNING.sub(r"\1", text)


def is_silenced(record: logging.LogRecord) -> bool:
    """Returns whether a record is one of the lines of libraries that users cannot act on."""
    library = record.name.partition(".")[0]
    return any(library == name and part in record.getMessage() for name, part in SILENCED)


def is_own_or_error(record: logging.LogRecord) -> bool:
    """Returns whether a record is of this package, or an error."""
    return record.name.partition(".")[0] == "hf_speechllm" or record.levelno >= logging.ERROR


def show_log(level: int = logging.INFO, timestamps: bool = False) -> None:
    """Prints log lines of this package and warnings of libraries to standard error.

    Other processes than the first print only warnings of this package and errors of libraries.

    Args:
        level: of this package's lines.
        timestamps: whether lines start with the time if standard error is not a terminal.
    """
    is_first = is_first_process()
    if hasattr(sys.stdout, "reconfigure"):  # names of files and sets in an encoding that lacks their letters
        sys.stdout.reconfigure(errors="backslashreplace")
    handler = LineHandler()
    handler.setFormatter(LogFormatter(timestamps and not sys.stderr.isatty()))
    handler.addFilter(lambda record: not is_silenced(record) and (is_first or is_own_or_error(record)))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("hf_speechllm").setLevel(level if is_first else max(level, logging.WARNING))
    logging.getLogger("DeepSpeed").addFilter(lambda record: not is_silenced(record))  # prints by its own handler
    logging.captureWarnings(True)
    # The value of this option of DDP is accelerate's to pass.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)


def quiet_transformers() -> None:
    """Prints warnings of transformers and of the Hub's client like all log lines, and bars only if they take long."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    transformers_logging.set_verbosity_warning()
    transformers_logging.set_tqdm_hook(_late_bar)
    quiet_hub()


def quiet_hub() -> None:
    """Prints warnings of the Hub's client, once it is imported, like all log lines."""
    logging.getLogger("huggingface_hub").handlers.clear()  # would print each line a second time


def _late_bar(factory: Callable[..., Any], args: tuple, options: dict[str, Any]) -> Any:
    hidden = None if is_first_process() else True  # None: hidden if standard error is not a terminal
    return factory(*args, **{**options, "delay": BAR_DELAY, "leave": False, "disable": hidden})


def is_first_process() -> bool:
    """Returns whether this process is the first of a launch, or the only process."""
    return os.environ.get("RANK", "0") == "0"


class ProgressLines(tqdm):
    """A progress bar for files: a log line every `LINE_INTERVAL` seconds instead of a bar."""

    def __init__(self, *args: Any, **options: Any):
        options |= {"file": io.StringIO(), "mininterval": LINE_INTERVAL, "maxinterval": math.inf, "leave": False}
        super().__init__(*args, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Logs the progress; the first line appears after `LINE_INTERVAL` seconds."""
        values = self.format_dict
        if msg == "" or values["elapsed"] < LINE_INTERVAL:  # closed, or just opened
            return True
        count, total, speed = values["n"], values["total"], values["n"] / values["elapsed"]
        parts = [f"{values['prefix']} {count}" + (f" of {total} ({100 * count / total:.0f} %)" if total else "")]
        rate, period = (speed, "s") if speed >= 0.1 else (60 * speed, "min")
        parts += [f"{rate:.3g} {values['unit'].strip()}/{period}", *([values["postfix"]] if values["postfix"] else [])]
        if total and speed:
            parts.append(f"ETA {format_seconds((total - count) / speed)}")
        logger.info(", ".join(parts))
        return True


def progress_bar(iterable: Iterable[Item] | None = None, **options: Any) -> tqdm:
    """Returns a progress bar on standard error: a tqdm bar on a terminal, otherwise a log line now and then.

    Args:
        iterable: see `tqdm`.
        **options: of `tqdm`: `desc`, `total`, `unit`, `disable`, `leave`, ...
    """
    if sys.stderr.isatty():
        return tqdm(iterable, **{"dynamic_ncols": True, **options})
    return ProgressLines(iterable, **options)


@contextlib.contextmanager
def bars_as_lines() -> Iterator[None]:
    """Makes log lines of the progress bars that libraries print while the block runs, unless standard error is a
    terminal: a log file would contain thousands of updates in a line."""
    if sys.stderr.isatty():
        yield
        return
    with contextlib.redirect_stderr(_BarsAsLines(sys.stderr)):  # type: ignore[type-var]
        yield


class _BarsAsLines:
    """A stream that logs progress bars every `LINE_INTERVAL` seconds, and passes other text to the stream it replaces.

    A tqdm bar begins each update with a carriage return.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._in_bar = False
        self._logged: dict[str, float] = {}  # time of the last line, or of the start, by name of the bar

    def write(self, text: str) -> int:
        """Writes text, or logs a bar if the time has come."""
        if text.startswith("\r"):
            self._show(text)
            self._in_bar = True  # the line of the log has passed through this method
        elif not (self._in_bar and _CURSOR.fullmatch(text)):
            self._in_bar = False
            self._stream.write(text)
        return len(text)

    def _show(self, text: str) -> None:
        bar = " ".join(_BLOCKS.sub(" ", text).split())
        now, name = time.monotonic(), _NUMBERS.split(bar)[0]
        if bar and now >= self._logged.setdefault(name, now) + LINE_INTERVAL:
            self._logged[name] = now
            logger.info("%s", bar)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def format_seconds(seconds: float) -> str:
    """Returns a duration as `H:MM:SS`, with days if needed."""
    return str(timedelta(seconds=round(seconds)))


def command(verb: str, *words: Any, **options: Any) -> str:
    """Returns a command line of `hf-speechllm`, quoted for the shell.

    Args:
        verb: of the command.
        *words: positional arguments.
        **options: options with values; `None` leaves an option out; a list gives several values.
    """
    line = ["hf-speechllm", verb, *map(str, words)]
    for name, value in options.items():
        if value is not None:
            line += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return shlex.join(line)


def print_summary(facts: Mapping[str, Any], commands: Sequence[str] = ()) -> None:
    """Prints the result of a command to standard output, and the commands to run next.

    Args:
        facts: values by name, in order; a list is printed in several lines, an empty value not at all.
        commands: command lines, printed without line breaks, so that they can be copied.
    """
    lines = [(name, str(item)) for name, value in facts.items() for item in _items(value)]
    lines += [("next", line) for line in commands]
    if not lines:
        return
    width = max(len(name) for name, _ in lines)
    named = [
        ("" if number and lines[number - 1][0] == name else name, name, text)
        for number, (name, text) in enumerate(lines)
    ]
    if not sys.stdout.isatty():
        for shown, _, text in named:
            print(f"{shown:{width}}  {text}".rstrip())
        sys.stdout.flush()
        return
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for shown, name, text in named:
        style = "bold cyan" if name == "next" else ""
        console.print(Text.assemble((f"{shown:{width}}  ", "dim"), (text, style)), soft_wrap=True)


def _items(value: Any) -> Sequence[Any]:
    if value is None or value == "":
        return ()
    return value if isinstance(value, (list, tuple)) else (value,)
