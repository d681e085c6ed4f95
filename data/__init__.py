"""Text to tokens to batches: sources.py (where text comes from), tokenizer.py, prepare.py, dataset.py, sampler.py, and
texts.py (several data sets in one run)."""
