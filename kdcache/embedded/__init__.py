"""The offline default: an instruction data set, a tokenizer, a teacher and a student, made from a seed."""
