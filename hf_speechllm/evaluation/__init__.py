"""Scoring of transcripts: normalisation, error rates, reports."""

from .normalizers import normalize_text

__all__ = ["normalize_text"]
