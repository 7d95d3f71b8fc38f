"""Normalisation and scoring of transcripts, and score reports."""

from pathlib import Path

from .normalizers import normalize_text
from .scoring import ErrorCounts, count_errors

METRIC_FOLDER = str(Path(__file__).with_name("mixed_error_rate"))  # for evaluate.load and evaluate.combine

__all__ = ["METRIC_FOLDER", "ErrorCounts", "count_errors", "normalize_text"]
