"""The instrument where people already are: their own loops, and the trainers of others."""
