"""Empty on purpose: a real package wins over any other folder or package called data."""
