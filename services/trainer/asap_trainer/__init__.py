"""Full fine-tuning on pruned traces: data, training process, and what launches and follows it."""
