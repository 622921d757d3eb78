"""Everything that differs from task to task, and what the tasks share: annotation files, metrics, losses, augmentation."""
