"""Tests of titan_ext. Imported before torchtitan is, in each process: on a machine without an accelerator it must be."""

import titan_ext  # noqa: F401
