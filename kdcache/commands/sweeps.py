"""Commands that train many students from one cache."""
