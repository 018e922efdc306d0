"""Many sites in one process, to develop and test methods with."""
