"""What a run will take before it starts: time of a sync, utilisation, days and money; ``titan-ext plan`` prints it."""
