"""What the package costs and how exact it is, measured: run as ``python -m benchmarks.<name>``."""
