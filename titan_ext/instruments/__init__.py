"""What an operator sees of a run: one reader of its data, one model of it, and views of that."""
