"""A finished run in the forms in which others load it: model folders, GGUF files, an adapter."""
