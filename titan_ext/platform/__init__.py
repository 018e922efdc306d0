"""What a machine without an accelerator needs before and after torchtitan builds a trainer.

On a machine with an accelerator every function here does nothing.
"""

from titan_ext.platform.cpu import adapt, finish, on_cpu, prepare

__all__ = ["adapt", "finish", "on_cpu", "prepare"]
