"""Every key of a configuration, for ``titan-ext help`` and the README of ``train_configs``."""
