"""What the files of a run, or of a part of one, say: one dataclass a section of the page."""
