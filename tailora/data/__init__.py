"""From a file of rows to token ids with labels: sources, shapes, templates, checks, batches."""
