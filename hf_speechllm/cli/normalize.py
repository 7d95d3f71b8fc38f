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
    """Reads lines `ID TEXT` (a tab, or else spaces between), gives `ID<tab>TOKENS`.

    Raises:
        ValueError: where a line is not UTF-8.
    """
    from ..evaluation.normalizers import normalize_text
    from ..evaluation.transcripts import split_line

    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                fields = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}:{number}: not UTF-8 ({error.reason}); convert the file with iconv"
                ) from error
            # Without a tab, the original splits at any white space of Unicode.
            id_, text = split_line(fields) if "\t" in fields else (*fields.split(maxsplit=1), "", "")[:2]
            if not id_:
                logger.warning("%s:%d: blank line, left out", path, number)
                continue
            yield f"{id_}\t{normalize_text(text)}\n"


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
