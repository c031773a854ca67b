"""What every room stands on: typed keys, files, streams of random numbers, statistics, the console."""
