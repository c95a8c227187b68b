"""Every matplotlib figure outside `explanation`."""
