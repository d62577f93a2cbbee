"""What small pretrained models learn: the runs behind docs/study.md."""
