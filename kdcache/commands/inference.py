"""Commands that measure how fast and how large students are."""
