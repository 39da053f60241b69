"""Data sets: the parquet schema (schema.py), GSM8K and MATH (gsm8k.py, math.py, prepare.py), and what the trainer reads
(dataset.py). No torch."""
