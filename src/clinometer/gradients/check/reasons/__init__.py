"""Why a gradient is wrong: circumstances tried one at a time, and each call of torch alone."""
