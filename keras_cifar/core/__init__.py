"""What every room stands on: configuration, command line, errors, files, environment, run directory."""
