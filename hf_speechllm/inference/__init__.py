"""Decoding: recordings in, texts out."""
