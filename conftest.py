pytest_plugins = ["mxharness.plugin"]
