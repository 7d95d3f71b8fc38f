"""Mixed error rate as a metric of the evaluate library; works offline.

>>> import evaluate
>>> from hf_speechllm.evaluation import METRIC_FOLDER
>>> evaluate.load(METRIC_FOLDER).compute(references=["turn on the 空调"], predictions=["turn on 空条"])
{'mixed_error_rate': 0.4, 'substitutions': 1, 'deletions': 1, 'insertions': 0, 'reference_tokens': 5}
"""

import datasets
import evaluate

from hf_speechllm.evaluation.scoring import ErrorCounts, count_errors

_DESCRIPTION = """\
Errors per reference token, where a token is a character of Chinese, Japanese or Korean, a digit, or a word of other
scripts: the character error rate of Chinese lines, the word error rate of English ones, both in one for mixed text.
"""
_INPUTS = """
Args:
    predictions: recognised texts.
    references: what was said, in the same order.
    normalize: whether spellings of the same words are made equal first (default: true).
Returns:
    mixed_error_rate: a fraction, over all texts together.
    substitutions, deletions, insertions, reference_tokens: the counts.
"""
_CITATION = ""


class MixedErrorRate(evaluate.Metric):
    """CER, WER or both, by script; the numbers of `hf-speechllm score`."""

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions, references, normalize=True):
        pairs = zip(references, predictions, strict=True)
        counts = sum((count_errors(*pair, normalize=normalize) for pair in pairs), ErrorCounts())
        return {
            "mixed_error_rate": counts.rate,
            "substitutions": counts.substitutions,
            "deletions": counts.deletions,
            "insertions": counts.insertions,
            "reference_tokens": counts.reference_tokens,
        }
