"""Stand-ins for what a machine without a GPU lacks, for tests and counts only; nothing in the package imports them."""
