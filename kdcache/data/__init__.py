"""A data set becomes ordered examples, and examples become token rows."""
