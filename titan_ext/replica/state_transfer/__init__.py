"""How a joining site gets the members' shared state."""
