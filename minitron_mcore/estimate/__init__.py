"""How many bytes of memory a rank needs for a step, by part, before anything is allocated."""
