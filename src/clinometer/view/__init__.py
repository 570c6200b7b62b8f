"""The microscope: a page that shows a run file live, the figures it is made of, and a report of them."""
