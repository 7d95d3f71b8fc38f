"""What exists for speed alone and touches private parts of other libraries."""
