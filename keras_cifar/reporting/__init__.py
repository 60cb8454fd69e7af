"""The report of runs: what is in their directories -> one HTML file. No TensorFlow here."""
