"""DEPT's variants against training on the mixture (``titan-ext bench dept``)."""
