"""Process groups, ranks and devices: who am I, and on what."""
