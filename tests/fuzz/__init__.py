"""Fuzzing of every decoder that reads bytes of somebody else: short in the suite, long behind `make fuzz`."""
