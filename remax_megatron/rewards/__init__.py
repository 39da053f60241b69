"""Scores of answers: the rules (gsm8k.py), and which rule a run uses (scoring.py). No torch."""
