"""What is shown and written of a run: progress, logs, plots, records, model cards."""
