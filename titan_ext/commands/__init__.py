"""The subcommands of ``titan-ext``, one file each, with ``add_parser(subparsers)`` and ``run(options)``."""
