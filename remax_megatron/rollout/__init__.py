"""Answers from vLLM inside the training ranks, and the bridge that keeps its weights those of the policy."""
