"""Metrics of ours in the form of the ``evaluate`` library; each file also loads by its path, without the Hub."""

from grape_hf.metrics.perplexity import Perplexity, perplexity_from_logits, token_nll

__all__ = ["Perplexity", "perplexity_from_logits", "token_nll"]
