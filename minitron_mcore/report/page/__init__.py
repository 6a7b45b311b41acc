"""The page: its sections, and the templates that lay them out."""
