"""Federations of federations: a shared backbone and key layers of each site\x27s own."""
