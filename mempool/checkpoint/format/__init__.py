"""What stands in a checkpoint's files, as values: pure, with strict readers. Loads no torch."""
