"""Scoring of transcripts: normalisation, error rates, reports."""

from hf_speechllm.evaluation.normalizers import normalize_text

__all__ = ["normalize_text"]
