"""Who runs which rows, and how rows become packed tensors."""
