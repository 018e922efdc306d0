"""``titan-ext bench chaos``: a small run of real sites under faults, and what must hold afterwards."""
