"""Optimizations that use private parts of other libraries; results stay the same without them."""
