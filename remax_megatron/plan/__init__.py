"""The plan before a launch: memory and time of a step, from the settings alone; see `__main__`."""
