"""Recordings in, features out: decoding of files, downloads, archives, VAD and fbank."""
