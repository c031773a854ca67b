"""One run: ``python -m pspo.run``, from its checks to its report."""
