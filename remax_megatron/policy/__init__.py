"""The Megatron policy: scoring, updating, and handing out its weights."""
