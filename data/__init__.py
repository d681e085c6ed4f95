"""Text to tokens: sources.py (where text comes from), tokenizer.py, prepare.py, dataset.py (what comes of it)."""
