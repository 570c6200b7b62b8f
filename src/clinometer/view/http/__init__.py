"""The microscope's server: routes, answers, limits."""
