"""A finding, its place in the code, and its forms: text, terminal, HTML, JSON."""
