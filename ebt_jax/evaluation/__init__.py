"""What trained parameters are worth: metrics, samples, plots, costs."""
