"""The figures of a page, as inline SVG."""
