"""Text to tokens: tokenizer.py (text <-> ids), dataset.py (prepared folders and batches), prepare.py (corpora -> folders)."""
