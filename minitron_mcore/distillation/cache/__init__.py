"""A teacher's targets on disk, and the teacher they stand in for."""
