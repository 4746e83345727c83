"""How ranks meet."""
