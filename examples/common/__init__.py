"""What the examples share: data, training, options, and what is shown of a run."""
