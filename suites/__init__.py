"""The suites: a topic of several files is a folder, and modules that are no test_*.py hold what files share.

Fixtures that files share are in a folder's conftest.py. There is none here: projects that tests of the plugin make, and
run in their own process, have a suites/conftest.py, which would be taken for this one.
"""
