"""Every class that derives from torchtitan's, and what it needs on a CPU. Importing this package imports neither."""
