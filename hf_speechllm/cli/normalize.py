"""Normalise transcripts before scoring: lines `ID TEXT` in, lines `ID<tab>TOKENS` out, in the same order.

Takes references and what `hf-speechllm decode` wrote alike; blank lines are left out, with a notice. Then score:

    hf-speechllm normalize data/val_text.txt data/val_norm.txt
    hf-speechllm normalize output.txt output_norm.txt
    compute-wer data/val_norm.txt output_norm.txt cer.txt
    tail -n8 cer.txt
"""

import logging
from collections.abc import Iterator
from pathlib import Path

from ..files import atomic_write
from .parser import Parser

logger = logging.getLogger("whisper_mix_normalize")


def normalized_lines(path: str) -> Iterator[str]:
    """Reads lines `ID TEXT` (space or tab), gives `ID<tab>TOKENS`; raises ValueError where a line is not UTF-8."""
    from ..evaluation.normalizers import normalize_text

    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                fields = line.decode("utf-8-sig" if number == 1 else "utf-8").split(maxsplit=1)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}:{number}: not UTF-8 ({error.reason}); convert the file with iconv"
                ) from error
            if not fields:
                logger.warning("%s:%d: blank line, left out", path, number)
                continue
            yield f"{fields[0]}\t{normalize_text(fields[1]) if len(fields) == 2 else ''}\n"


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("input_file", metavar="IN", help="lines `ID TEXT`, UTF-8")
    parser.add_argument("output_file", metavar="OUT", help="file to write; one that exists is replaced")
    args = parser.parse_args()
    if not Path(args.input_file).is_file():
        parser.error(f"{args.input_file}: no such file")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        with atomic_write(args.output_file) as output:
            output.writelines(normalized_lines(args.input_file))
    except (OSError, ValueError) as error:
        logger.error("%s; nothing was written", error)
        return 1
    return 0
