"""What can be said of an optimizer and of one step of it without its formula."""
