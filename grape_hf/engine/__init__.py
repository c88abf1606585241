"""One training run: what a step is, when to calibrate, what is looked at, kept and refused."""
