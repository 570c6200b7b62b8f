"""Ranks: what they hold in parts, how they meet, and what they reduce."""
