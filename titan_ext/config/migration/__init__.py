"""From the configurations of torchtitan 0.1 and 0.2 to ours."""
