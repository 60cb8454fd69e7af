"""Which devices and machines a run computes on, and which replica reads what."""
