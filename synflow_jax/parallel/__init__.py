"""One network over several devices, and several processes as one job."""
