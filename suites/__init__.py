"""The suites: a topic of several files is a folder, and modules that are no test_*.py hold what files share."""
