"""Writes a word list for `hf-speechllm synthesize --word_list`: the more frequent a word, the more lines it has.

    pip install wordfreq
    python benchmarks/word_list.py /usr/share/dict/words > words.txt

Frequencies are those of wordfreq (English); words after the 8,000 most frequent must be in the dictionary, whose
capital letters are kept. The most frequent 1,500 words, which texts contain anyway, have one line each.
"""

import re
import sys
from pathlib import Path

from wordfreq import top_n_list

WORDS = 45_000
TEXTS, COMMON, FREQUENT, USUAL = 1_500, 8_000, 12_000, 25_000  # ranks
SHORTEST = 3  # letters of a word that is not among the first 300; shorter ones are mostly abbreviations


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    known = {word.lower(): word for word in reversed(Path(sys.argv[1]).read_text(encoding="utf-8").split())}
    for rank, word in enumerate(top_n_list("en", WORDS)):
        usable = re.fullmatch(r"[a-z]+(?:'[a-z]+)?", word) and (len(word) >= SHORTEST or rank <= 300)
        if usable and (word in known or rank <= COMMON):
            lines = 1 if rank < TEXTS or rank >= USUAL else 3 if rank < FREQUENT else 2
            sys.stdout.write(f"{known.get(word, word)}\n" * lines)


if __name__ == "__main__":
    main()
