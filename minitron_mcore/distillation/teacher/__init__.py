"""The teacher beside the student: it runs ahead, in its own layout and placement."""
