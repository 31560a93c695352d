"""Stories told with the real processes on one machine: demo, real domains, faults."""
