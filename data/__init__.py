"""Text and tokens. A real package, so that it wins over any other folder or package called data."""
