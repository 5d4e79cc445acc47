"""Pages: one self-contained file, escaped text, charts as inline SVG."""
