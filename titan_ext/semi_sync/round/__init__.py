"""The phases of an outer round: agreement, exchange, healing and commit."""
