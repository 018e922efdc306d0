"""AbbIE's variants over iterations (``titan-ext bench abbie``)."""
