"""What `python -m keras_cifar.benchmark` runs, each measurement in a process of its own."""
