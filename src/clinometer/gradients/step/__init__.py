"""explain_step(): one optimizer step, replayed in float64 and explained."""
