"""One conversation made visible: what was kept of it, by which heads, in how many blocks."""
