"""Phase two: train a student from a cache, without the teacher and without the data set."""
