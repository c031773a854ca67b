"""The states of a group's runs: done, running, waiting, or how each run ended."""
