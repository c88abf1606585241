"""Whole trainings of language models and image classifiers, and their comparison, for recipes/ and ``grape-hf``."""
