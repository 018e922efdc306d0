"""What ``titan-ext bench dept`` is made of: arms, text, pre-training, adaptation, and the report."""
