"""The cache on disk. Nothing here imports torch or transformers; ``cache_format.md`` is the contract."""
