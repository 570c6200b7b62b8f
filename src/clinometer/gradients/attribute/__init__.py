"""attribute(): one weight's gradient as a sum over the tokens that pushed it."""
