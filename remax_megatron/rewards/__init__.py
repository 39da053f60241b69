"""Scores of answers: the rules (gsm8k.py, math.py, code.py with sandbox/), which of them a run uses (scoring.py), and
the killable processes they run in (pool.py, worker.py). No torch."""
