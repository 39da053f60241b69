"""Dense models under Megatron-Core: architecture, attention backends, and the table that names its weights."""
