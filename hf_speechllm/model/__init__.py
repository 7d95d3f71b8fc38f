"""The model: configuration, composition, adaptors, loss, dialogue format and processor."""
