"""Help tests: models, rows and stand-ins that several test files share."""
