"""Text to tokens: tokenizer.py (text <-> ids), sources.py (where text comes from), prepare.py, dataset.py (the result)."""
