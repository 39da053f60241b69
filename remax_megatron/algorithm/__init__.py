"""The mathematics of ReMax: advantages, losses, log-probabilities. Tensors and groups in, tensors out."""
