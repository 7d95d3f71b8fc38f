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
Errors per reference token. A token is a character of Chinese, Japanese or Korean, a digit, or a word of other scripts.
For Chinese lines this is the character error rate, for English lines the word error rate.
"""
_INPUTS = """
Args:
    predictions: recognised transcripts.
    references: correct transcripts, in the same order.
    normalize: whether to normalise the texts first (default: true).
Returns:
    mixed_error_rate: fraction, over all texts together.
    substitutions, deletions, insertions, reference_tokens: counts.
"""
_CITATION = ""


class MixedErrorRate(evaluate.Metric):
    """CER, WER or mixed error rate, by script; equal to the result of `hf-speechllm score`."""

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
