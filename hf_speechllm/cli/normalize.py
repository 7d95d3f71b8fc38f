"""Normalise transcripts before scoring: reads lines `ID TEXT`, writes lines `ID<tab>TOKENS` in the same order.

Accepts references and the output of `hf-speechllm decode`. Blank lines are skipped with a warning. Score afterwards:

    hf-speechllm normalize data/val_text.txt data/val_norm.txt
    hf-speechllm normalize output.txt output_norm.txt
    compute-wer data/val_norm.txt output_norm.txt cer.txt
    tail -n8 cer.txt
"""

import logging
from collections.abc import Iterator
from pathlib import Path

from ..console import show_log
from ..files import atomic_write
from .parser import Parser

logger = logging.getLogger(__name__)


def normalized_lines(path: str) -> Iterator[str]:
    """Converts lines `ID TEXT` (separated by a tab, otherwise by spaces) to `ID<tab>TOKENS`.

    Raises:
        ValueError: if a line is not UTF-8.
    """
    from ..data.transcripts import split_line
    from ..evaluation.normalizers import normalize_text

    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                fields = line.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}:{number}: not UTF-8 ({error.reason}); convert the file to UTF-8 with iconv"
                ) from error
            # Without a tab, the original script splits at any Unicode white space.
            id_, text = split_line(fields) if "\t" in fields else (*fields.split(maxsplit=1), "", "")[:2]
            if not id_:
                logger.warning("%s:%d: blank line, skipped", path, number)
                continue
            yield f"{id_}\t{normalize_text(text)}\n"


def main() -> int:
    """Runs the command; see the docstring of the module."""
    parser = Parser(__doc__)
    parser.add_argument("input_file", metavar="IN", help="lines `ID TEXT`, UTF-8")
    parser.add_argument("output_file", metavar="OUT", help="file to write; an existing file is replaced")
    args = parser.parse_args()
    if not Path(args.input_file).is_file():
        parser.file_error(f"{args.input_file}: no such file")
    show_log()
    try:
        with atomic_write(args.output_file) as output:
            output.writelines(normalized_lines(args.input_file))
    except (OSError, ValueError) as error:
        logger.error("%s; no output was written", error)
        return 1
    return 0
