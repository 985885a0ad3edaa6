"""Training: data sets, losses and stages. Nothing here is imported when restoring."""
