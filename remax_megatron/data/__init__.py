"""Data sets: the parquet schema (schema.py), GSM8K (gsm8k.py), and what the trainer reads (dataset.py). No torch."""
