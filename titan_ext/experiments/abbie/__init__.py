"""What ``titan-ext bench abbie`` is made of: variants, training, evaluation, speed, and the report."""
