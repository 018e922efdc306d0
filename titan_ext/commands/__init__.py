"""The subcommands of ``titan-ext``, one file each, which defines a ``COMMAND``."""
