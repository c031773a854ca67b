"""Ways to write completions, each behind the interface ``Sampler``."""
