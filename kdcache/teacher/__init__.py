"""Phase one: run the teacher once and keep a sparse picture of every response token's distribution."""
