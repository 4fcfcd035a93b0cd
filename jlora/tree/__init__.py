"""Trees of parameters: their paths as "a/b/c", and their modules."""
