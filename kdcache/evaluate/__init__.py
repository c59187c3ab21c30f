"""Judging students: token-summed perplexity and the KL to the teacher, straight from the cache."""
