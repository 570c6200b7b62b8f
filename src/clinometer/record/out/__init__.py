"""The same numbers elsewhere: tables, TensorBoard, trackers."""
