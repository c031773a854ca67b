"""Arms of a matched comparison from run directories: means, paired differences, and how sure one may be of them."""
