"""The model: configuration, modeling, adaptors, loss, dialogue format and processor."""
