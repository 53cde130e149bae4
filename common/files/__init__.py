"""What is on the disk: read with checks, written whole."""
