"""What a file's settings, sites and machine must hold before anything starts; each refusal names its key."""
