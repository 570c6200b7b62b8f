"""The language model, as pure functions of a weights dict, and a module that holds the weights."""
