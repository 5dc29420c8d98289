"""Flow maps: students that jump from any time to any other, told both."""
